"""Stages chained by a pipeline file, what each makes sure of, and what it says of itself."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from llava_kd.assembly import pipeline
from llava_kd.cli import main


@pytest.fixture
def chain(stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pipeline of two stages, started in this process to save time."""
    first = stage("first", template="plain", trainable=("multi_modal_projector",), max_steps=1)
    second = stage("second", distilled=False, max_steps=1)
    model = first.with_suffix("") / "model"
    stages = [
        {"config": first.name},
        {"config": second.name, "overrides": {"student.checkpoint": str(model), "optim": {"lr": 1e-4}}},
    ]
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump({"stages": stages}))
    monkeypatch.setattr(pipeline, "_run", lambda command, _: main(list(command[command.index("train") :])))
    return path


def record(path: Path, name: str) -> dict:
    return json.loads((path.parent / name / "run.json").read_text())


def test_a_pipeline_runs_its_stages_and_then_skips_them(chain: Path, capsys) -> None:
    assert main(["run", str(chain)]) == 0
    first, second = record(chain, "first"), record(chain, "second")
    assert first["parent"] is None
    assert second["parent"]["run"] == str(chain.parent / "first")
    assert second["parent"]["model"] == first["model"]
    assert second["steps"] == 1
    assert {"frozen part of the student", "data or tokenizer"} <= second["fingerprints"].keys()
    assert "lr: 0.0001" in second["config"]
    capsys.readouterr()
    assert main(["run", str(chain)]) == 0
    assert capsys.readouterr().out.count("complete, skipped") == 2


def test_a_broken_stage_stops_the_pipeline_which_then_goes_on(chain: Path, capsys) -> None:
    records = chain.parent / "records.json"
    tree = yaml.safe_load(chain.read_text())
    tree["stages"][1]["overrides"]["data.path"] = str(records)
    chain.write_text(yaml.safe_dump(tree))
    assert main(["run", str(chain)]) == 2
    assert "stage 2 of 2" in capsys.readouterr().err
    source = yaml.safe_load((chain.parent / "second.yaml").read_text())["data"]["path"]
    records.write_text(Path(source).read_text())
    assert main(["run", str(chain)]) == 0
    assert "stage 1 of 2, first.yaml" in capsys.readouterr().out


def test_a_finished_stage_with_other_settings_is_not_skipped_in_silence(chain: Path, capsys) -> None:
    assert main(["run", str(chain)]) == 0
    assert main(["run", str(chain), "--seed=1"]) == 2
    assert "is complete, but with other settings: seed: 0 -> 1" in capsys.readouterr().err


def test_a_stage_that_was_stopped_stops_the_pipeline_which_does_not_pass_for_done(
    chain: Path, monkeypatch, capsys
) -> None:
    """Its stage alone was told, by SIGTERM say, and has saved: a script must not begin what waits for it."""
    monkeypatch.setattr(pipeline, "_run", lambda *_: 0)
    assert main(["run", str(chain)]) == 143
    said = capsys.readouterr().out
    assert "stopped after a checkpoint" in said
    assert "stage 2" not in said


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ("", "must hold `key: value` lines"),
        ("[1]", "must hold `key: value` lines"),
        ("{seed: 1, output_dir: x}", "is a stage, not a pipeline: run `llava-kd train "),
        ("{seeds: [1]}", "must contain `stages` (a list) and optionally `command`; got seeds"),
        ("stages: first.yaml", "`stages` must be a list"),
        ("stages: []", "must contain `stages`"),
        ("{stages: [{config: a.yaml}], step: 1}", "must contain `stages`"),
        ("stages: [{overrides: {a: 1}}]", "a stage must have `config`"),
        ("stages: [{config: none.yaml}]", "no config file"),
        ("stages: [{config: first.yaml, overrides: [1]}]", "must be `key: value` lines"),
        ("stages: [{config: first.yaml}, {config: first.yaml}]", "needs its own output_dir"),
    ],
)
def test_a_mistake_in_the_file_is_one_line_before_anything_runs(
    chain: Path, capsys, tree: str, words: str
) -> None:
    chain.write_text(tree)
    assert main(["run", str(chain)]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert not (chain.parent / "first").exists()


def test_the_next_stage_refuses_a_student_that_is_unfinished_or_changed(stage, capsys) -> None:
    first = stage("first", distilled=False, max_steps=1)
    second = stage("second", distilled=False, max_steps=1)
    assert main(["train", str(first)]) == 0
    output = first.with_suffix("")
    words = ["train", str(second), f"--student.checkpoint={output / 'model'}"]
    (output / "model" / "README.md").write_text("a note of the user")
    weights = load_file(output / "model" / "model.safetensors")
    name = sorted(weights)[0]
    weights[name] = weights[name] + 1
    save_file(weights, output / "model" / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    assert main(words) == 2
    assert "must be as its run wrote it, but model.safetensors changed" in capsys.readouterr().err
    (output / "run.json").unlink()
    assert main(words) == 2
    assert "which is not complete; finish that stage first" in capsys.readouterr().err


def test_the_model_card_says_where_the_student_comes_from(stage, teacher_dir: Path) -> None:
    config = stage("run", max_steps=1)
    assert main(["train", str(config)]) == 0
    card = (config.with_suffix("") / "model" / "README.md").read_text()
    written = json.loads((config.with_suffix("") / "run.json").read_text())
    assert f"| teacher | {teacher_dir.name} |" in card
    assert written["fingerprints"]["teacher"] in card
    assert "AutoModelForImageTextToText" in card
    assert written["model"].keys() >= {"model.safetensors", "config.json", "tokenizer.json"}
    assert "README.md" not in written["model"]


# Real processes ----

STAGE = """#!/bin/bash
trap 'sleep 0.3; echo saved; exit 0' TERM USR1
trap 'sleep 0.3; echo saved; exit 130' INT
echo "stage $$ $1"
while :; do sleep 0.05; done
"""


@pytest.fixture
def started(stage, tmp_path: Path):
    """`llava-kd run` of two stages that wait to be stopped, from another directory than its file's."""
    first, second = stage("first", distilled=False), stage("second", distilled=False)
    (tmp_path / "wait.sh").write_text(STAGE)
    tree = {"command": "bash wait.sh", "stages": [{"config": first.name}, {"config": second.name}]}
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(tree))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [sys.executable, "-m", "llava_kd.cli", "run", "../pipeline.yaml"]
    with subprocess.Popen(
        command, cwd=elsewhere, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        yield process
        process.kill()


def stage_of(process: subprocess.Popen[str]) -> int:
    """Process of the stage, once it runs."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("stage ") and "first.yaml" in line and "starts" not in line:
            return int(line.split()[1])
    raise AssertionError("the first stage never ran")


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGUSR1, 138, marks=pytest.mark.slow), (signal.SIGINT, 130)],
)
def test_a_signal_stops_the_stage_that_runs_and_no_other_starts(
    started, number: signal.Signals, status: int
) -> None:
    stage_of(started)
    started.send_signal(number)
    said, _ = started.communicate(timeout=30)
    assert started.returncode == status
    assert "saved" in said
    assert f"stopped by {number.name}; run the same command again to continue" in said
    assert "second.yaml" not in said


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_a_killed_pipeline_takes_its_stage_along(started) -> None:
    stage_of(started)
    started.kill()
    assert "saved" not in started.stdout.read()  # until the stage too has let go of the pipe


def test_a_script_that_is_not_there_is_said_before_anything_runs(chain: Path, capsys) -> None:
    chain.write_text("command: bash none.sh\nstages: [{config: first.yaml}]")
    assert main(["run", str(chain)]) == 2
    assert "`command` names the script none.sh" in capsys.readouterr().err
