"""Stages chained by a pipeline file, what each makes sure of, and what it says of itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from llava_kd.build import pipeline
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
    monkeypatch.setattr(pipeline, "_run", lambda command: main(list(command[command.index("train") :])))
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
    assert "is complete with other settings: seed: 0 -> 1" in capsys.readouterr().err


def test_a_stage_that_was_stopped_stops_the_pipeline_without_failure(
    chain: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(pipeline, "_run", lambda _: 0)
    assert main(["run", str(chain)]) == 0
    said = capsys.readouterr().out
    assert "stopped after a checkpoint" in said
    assert "stage 2" not in said


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ("[1]", "must hold `stages`"),
        ("stages: []", "must hold `stages`"),
        ("{stages: [{config: a.yaml}], step: 1}", "must hold `stages`"),
        ("stages: [{overrides: {a: 1}}]", "a stage has `config`"),
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
    assert "is no longer what its run wrote: model.safetensors changed" in capsys.readouterr().err
    (output / "run.json").unlink()
    assert main(words) == 2
    assert "which is not complete; finish that stage first" in capsys.readouterr().err


def test_the_model_card_says_where_the_student_comes_from(stage, teacher_dir: Path) -> None:
    config = stage("run", max_steps=1)
    assert main(["train", str(config)]) == 0
    card = (config.with_suffix("") / "model" / "README.md").read_text()
    written = json.loads((config.with_suffix("") / "run.json").read_text())
    assert f"| teacher | {teacher_dir} |" in card
    assert written["fingerprints"]["teacher"] in card
    assert "AutoModelForImageTextToText" in card
    assert written["model"].keys() >= {"model.safetensors", "config.json", "tokenizer.json"}
    assert "README.md" not in written["model"]
