"""Words as people write them, `env`, and how soon `llava-kd` answers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub.constants import HF_HUB_CACHE

from llava_kd.assembly.projects import environment
from llava_kd.assembly.runs import logs
from llava_kd.cli import main, words
from llava_kd.cli.words import joined, spelled

# Modules that take seconds to import.
SLOW = ("torch", "transformers")
PROBE = (
    "import sys; from llava_kd.cli import main; sys.argv = ['llava-kd', *sys.argv[1:]]\n"
    "try: status = main()\n"
    "except SystemExit as end: status = end.code\n"
    f"print('imported', sorted(set({SLOW!r}) & set(sys.modules)), 'status', status, file=sys.stderr)"
)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (["--optim.lr", "1e-4"], ["--optim.lr=1e-4"]),
        (["--optim.lr", "1e-4", "x.yaml"], ["--optim.lr=1e-4", "x.yaml"]),
        (["x.yaml", "--dry-run"], ["x.yaml", "--dry_run"]),
        (["--data.max-length=8"], ["--data.max_length=8"]),
        (["--student.vision_feature_layer", "-1"], ["--student.vision_feature_layer=-1"]),
        (["--output_dir=a-b", "c-d.yaml"], ["--output_dir=a-b", "c-d.yaml"]),
        (["--log.tensorboard", "--seed=1"], ["--log.tensorboard", "--seed=1"]),
        (["--objective.visual_kl={weight: 1.0}"], ["--objective.visual_kl={weight: 1.0}"]),
    ],
)
def test_words_are_spelled_as_the_commands_know_them(written: list[str], meant: list[str]) -> None:
    assert spelled(written) == meant
    assert spelled(meant) == meant


def test_an_option_may_name_a_path_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert spelled(["--out=~/e", "--data.path", "~x"]) == ["--out=/home/me/e", "--data.path=~x"]


def test_a_value_without_a_sign_belongs_to_its_setting() -> None:
    assert joined(["--seed", "3", "--optim.lr=1", "--epochs", "2"]) == [
        "--seed=3",
        "--optim.lr=1",
        "--epochs=2",
    ]
    assert joined(["x=1", "--seed"]) == ["x=1", "--seed"]


def test_either_spelling_trains_the_same_stage(
    stage: Callable[..., Path], capsys: pytest.CaptureFixture
) -> None:
    shown = []
    for words_ in (
        ["--optim.lr=0.5", "--seed=3", "--dry_run"],
        ["--optim.lr", "0.5", "--seed", "3", "--dry-run"],
    ):
        assert main(["train", str(stage("run")), *words_]) == 0
        shown.append(capsys.readouterr().out)
        assert main(["config", str(stage("run")), *words_[:-1]]) == 0
        assert "lr: 0.5" in capsys.readouterr().out
    assert shown[0] == shown[1]


@pytest.mark.parametrize("written", ["off", "none", "None", "false", "no"])
def test_off_is_told_what_it_is_called_here(
    stage: Callable[..., Path], capsys: pytest.CaptureFixture[str], written: str
) -> None:
    assert main(["train", str(stage("run")), f"--objective.visual_kl={written}"]) == 2
    assert (
        "`objective.visual_kl` is switched off by null; write --objective.visual_kl=null"
        in capsys.readouterr().err
    )


def test_off_is_off_where_that_is_a_value(
    stage: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", str(stage("run")), "--log.tensorboard=off", "--log.wandb_project=none"]) == 0
    out = capsys.readouterr().out
    assert "tensorboard: false" in out
    assert "wandb_project: none" in out


def test_verbose_reaches_what_the_command_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words.VERBOSE == logs.VERBOSE
    monkeypatch.setenv(logs.VERBOSE, "")
    assert main(["config", "seed", "--verbose"]) == 0
    assert logs.is_verbose()


# A second is the aim; what is tested is that nothing slow is imported, which holds on a busy machine too.
MISTAKES = [
    (["train", "none.yaml"], "no config file none.yaml"),
    (["train", "{stage}", "--optim.rate=1"], "no setting `rate` in `optim`"),
    (["train", "{stage}", "--optim.lr", "fast"], "`optim.lr` must be a number; got 'fast'"),
    (["check", "{stage}", "--teacher.checkpoint=/no/such"], "the LLaVA checkpoint /no/such does not exist"),
    (["cache-teacher", "{stage}", "--out", "x", "--seed=a"], "`seed` must be a whole number"),
    (["run", "none.yaml"], "no pipeline file none.yaml"),
    (["ablate", "none.yaml"], "no ablation file none.yaml"),
    (["config", "optim.rate"], "no setting `optim.rate`"),
    (["eval", "--model", "/no/such", "--data", "x", "--out", "y"], "no model directory /no/such"),
    (["eval", "--model", "a/b", "--data", "x.json", "--out", "y"], "no test file x.json"),
    (["report", "--run", "none"], "none is no run and holds none"),
    (["chat", "--model", "./none", "hi"], "no model directory ./none"),
    (["chat", "--model", "{model}", "--image", "none.png", "hi"], "no image file none.png"),
    (["export", "./none", "--out", "x"], "./none does not exist"),
    (["convert", "./none", "--out", "x"], "./none has no config.json"),
    (["data", "verify", "--data", "none.json"], "no data file none.json"),
    (["data", "verify", "--data", "{stage}", "--model", "{stage}"], "no model directory"),
    (["data", "verify", "--data", "{stage}", "--report", "none/x"], "there is no none: create it"),
    (["train", "{pipeline}"], "is a pipeline, not a stage: run `llava-kd run "),
    (
        ["data", "select", "{stage}", "--reference", "./none", "--keep", "0.5", "--out", "x"],
        "./none does not exist",
    ),
    (["init", "x", "--data", "none.csv"], "no image folder"),
    (["watch", "none"], "no run none"),
    (["--help"], ""),
    (["train", "--help"], ""),
]


@pytest.mark.parametrize(("asked", "said"), MISTAKES, ids=lambda value: " ".join(value)[:40] if value else "")
def test_a_mistake_is_answered_before_anything_slow_is_imported(
    stage: Callable[..., Path], student_dir: Path, tmp_path: Path, asked: list[str], said: str
) -> None:
    pipeline = tmp_path / "pipeline.yaml"
    pipeline.write_text("stages: [{config: a.yaml}]")
    paths = {"{stage}": str(stage("run")), "{model}": str(student_dir), "{pipeline}": str(pipeline)}
    if "no image folder" in said:
        asked = [*asked[:-1], str(tmp_path / "gone" / "none.csv")]
    command = [sys.executable, "-c", PROBE, *(paths.get(word, word) for word in asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert said in done.stderr
    assert done.stderr.splitlines()[-1] == f"imported [] status {0 if '--help' in asked else 2}"


KINDS = {
    "train": ("stage", "{output_dir: x, student: {}}"),
    "run": ("pipeline", "stages: [{config: a.yaml}]"),
    "ablate": ("grid", "{stages: {}, arms: {a: [b]}}"),
    "search": ("search", "{recipe: a.yaml, seed: 1, space: {}}"),
}


@pytest.mark.parametrize("own", KINDS)
@pytest.mark.parametrize("asked", KINDS)
def test_a_file_of_another_kind_is_sent_to_its_command(
    asked: str, own: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, text = KINDS[own]
    path = tmp_path / "file.yaml"
    path.write_text(text)
    assert main([asked, str(path)]) == 2
    said = f"this is a {kind}, not a {KINDS[asked][0]}: run `llava-kd {own} {path}`"
    assert (said in capsys.readouterr().err) is (asked != own)


SHAPES = ["data", "shapes", "--out", "made", "--num_train=2", "--num_validation=1", "--num_test=1"]


@pytest.mark.parametrize(
    ("asked", "closed", "status"),
    [
        (["watch", "."], ">&-", 0),
        (["watch", "none"], "2>&-", 2),
        (SHAPES, ">/dev/null 2>&-", 0),
        (["watch", "."], ">&3", 128 + signal.SIGPIPE),
        (["recipes", "list"], ">&3", 0),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else None,
)
def test_a_stream_that_is_closed_or_that_nobody_reads_is_no_error(
    tmp_path: Path, asked: list[str], closed: str, status: int
) -> None:
    """3 is a pipe whose reader has left, as after `| head -1`."""
    (tmp_path / "config.yaml").touch()
    reader, writer = os.pipe()
    os.close(reader)
    shell = ["bash", "-c", f'"$0" -m llava_kd.cli "$@" 3>&{writer} {closed}', sys.executable, *asked]
    done = subprocess.run(shell, capture_output=True, text=True, check=False, cwd=tmp_path, pass_fds=[writer])
    os.close(writer)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


def test_a_hub_id_that_is_out_of_reach_names_the_cache(
    stage: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The tests are offline; a machine without network is told the same."""
    parts = "{vision_tower: google/siglip-so400m-patch14-384, language_model: Qwen/Qwen2.5-0.5B}"
    asked = {
        "chat": ["--model", "llava-hf/llava-1.5-7b-hf", "hi"],
        "train": [str(stage("run")), f"--student={parts}"],
    }
    for command, rest in asked.items():
        assert main([command, *rest]) == 2
        said = capsys.readouterr().err
        assert f"({HF_HUB_CACHE})" in said
        assert "`hf download " in said
        assert "Traceback" not in said


def test_env_says_versions_and_nothing_of_the_user(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a-secret-value")
    monkeypatch.setenv("HF_TOKEN", "another-secret")
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    import torch
    import transformers

    lines = dict(line.split(maxsplit=1) for line in out.splitlines() if not line.startswith("not installed"))
    assert lines["torch"] == torch.__version__
    assert lines["transformers"] == transformers.__version__
    assert lines["cpu"].endswith("cores for this process")
    assert "secret" not in out
    for private in (
        str(Path.home()),
        str(environment.__file__),
        os.uname().nodename,
        str(Path.cwd()),
        sys.prefix,
    ):
        assert private not in out
