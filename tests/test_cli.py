"""Every mistake that a user can mend is one clear line on stderr and exit status 2."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_llava import make_tiny_llava
from tokenizers import Tokenizer
from transformers import LlavaProcessor

from llava_kd.assembly import check as build_check
from llava_kd.assembly import train as build_train
from llava_kd.cli import main

Stage = Callable[..., Path]
HERE = Path.cwd()


@pytest.fixture
def complaint(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail, and returns the line that says why (lists may follow, indented)."""

    def run(*words: str | Path) -> str:
        capsys.readouterr()
        assert main([str(word) for word in words]) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        lines = said.splitlines()
        first = next(i for i, line in enumerate(lines) if line.startswith(f"llava-kd {words[0]}: "))
        assert all(line.startswith("  ") for line in lines[first + 1 :]), said
        return "\n".join(lines[first:])

    return run


# Settings ----


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--optim.learning_rate=1", "no setting `learning_rate` in `optim`; the settings are lr,"),
        ("--optm.lr=1", "no setting `optm` (did you mean `optim`?)"),
        ("--optim.lr=high", "`optim.lr` must be a number; got 'high'"),
        ("--global_batch_size=four", "`global_batch_size` must be a whole number; got 'four'"),
        ("--teacher=null", "distillation terms but `teacher` is null; set teacher.checkpoint"),
        ("--objective={cross_entropy: {}}", "`teacher` is set but no term of `objective` uses it; add"),
        ("--data.template=alpaca", "`data.template` must be auto or one of plain, vicuna,"),
        ("--engine.device=tpu", "`engine.device` must be one of auto, cpu, cuda; got 'tpu'"),
        ("optim.lr=1", "an override looks like --optim.lr=1e-4; got 'optim.lr=1'"),
        ("--objective.response_kl.mix=0", "`objective.response_kl.mix` must be between 0 and 1; got 0"),
    ],
)
def test_a_bad_setting(stage: Stage, complaint: Callable[..., str], override: str, words: str) -> None:
    assert words in complaint("train", stage("run"), override)


def test_a_missing_recipe(complaint: Callable[..., str], tmp_path: Path) -> None:
    assert "no config file" in complaint("train", tmp_path / "none.yaml")


# Models ----


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--student.checkpoint=/no/such/one", "the LLaVA checkpoint /no/such/one does not exist; give a"),
        (
            "--student.checkpoint=runs/no/model",
            f"runs/no/model does not exist (looked for from {HERE}, where the command was given): a stage "
            "writes it at its end; finish that stage first",
        ),
        (
            "--teacher.checkpoint=./no/such/model",
            f"the LLaVA checkpoint ./no/such/model does not exist (looked for from {HERE}, where the command",
        ),
        (
            "--student={vision_tower: /no/tower, language_model: /no/llm}",
            "the vision tower /no/tower does not",
        ),
    ],
)
def test_a_missing_model(stage: Stage, complaint: Callable[..., str], override: str, words: str) -> None:
    assert words in complaint("train", stage("run"), override)


def test_tokenizers_that_differ(stage: Stage, complaint: Callable[..., str], tmp_path: Path) -> None:
    other = make_tiny_llava(tmp_path / "other", vocab_size=280)
    processor = LlavaProcessor.from_pretrained(other)
    tree = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    vocabulary = tree["model"]["vocab"]
    vocabulary["!"], vocabulary['"'] = vocabulary['"'], vocabulary["!"]
    processor.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(tree))
    processor.save_pretrained(other)
    said = complaint("train", stage("run"), f"--teacher.checkpoint={other}")
    assert "tokenizers must have the same content" in said
    assert "id 0: '!' against '\"'" in said
    assert "Use a teacher of the student's family, or drop response_kl and visual_kl" in said


def test_grids_that_differ(stage: Stage, complaint: Callable[..., str], tmp_path: Path) -> None:
    other = make_tiny_llava(tmp_path / "other", vocab_size=280, patch_size=16)
    said = complaint("train", stage("run"), f"--teacher.checkpoint={other}")
    assert "the student has 16 visual tokens an image" in said


# Data ----


@pytest.fixture
def data(tmp_path: Path, shapes_dir: Path) -> Path:
    """A copy of the shapes data with four records of an image each, that a test may spoil."""
    copy = tmp_path / "shapes"
    shutil.copytree(shapes_dir, copy)
    for name in ("instructions.json", "captions.json"):
        by_image = {entry["image"]: entry for entry in json.loads((copy / name).read_text())}
        (copy / name).write_text(json.dumps(list(by_image.values())[:4]))
    return copy


def overrides(data: Path, rate: float = 0.0) -> list[str]:
    path = data / "instructions.json"
    return [f"--data.path={path}", f"--data.images={data}", f"--data.max_bad_rate={rate}", "--max_steps=1"]


def spoil_record(data: Path, change: Callable[[dict], object]) -> str:
    """Change one record of the file; its id."""
    path = data / "instructions.json"
    entries = json.loads(path.read_text())
    change(entries[2])
    path.write_text(json.dumps(entries))
    return entries[2]["id"]


RECORDS: dict[str, tuple[Callable[[dict], object], str]] = {
    "no conversations": (lambda r: r.pop("conversations"), "no conversations"),
    "empty conversations": (lambda r: r.update(conversations=[]), "no conversations"),
    "a placeholder too many": (
        lambda r: r["conversations"][0].update(value="<image>\n<image>\nWhat?"),
        "every image needs one <image> in a user turn, got 2 for 1 images",
    ),
    "an empty answer": (lambda r: r["conversations"][1].update(value="  "), "is an empty answer"),
    "a path out of the root": (lambda r: r.update(image="../secret.png"), "must stay below the image root"),
    "an absolute path": (lambda r: r.update(image="/etc/passwd"), "set data.images to a folder above it"),
}


@pytest.mark.parametrize("kind", RECORDS)
def test_a_bad_record(stage: Stage, complaint: Callable[..., str], data: Path, kind: str) -> None:
    change, words = RECORDS[kind]
    record_id = spoil_record(data, change)
    said = complaint("train", stage("run"), *overrides(data))
    assert "1 of the 4 records" in said.splitlines()[0] or "1 of the 2 records read" in said.splitlines()[0]
    assert "--write_sound NEW` writes a file without them" in said.splitlines()[0]
    assert words in said
    assert record_id in said


IMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: path.unlink(), "is missing below"),
    "corrupt": (lambda path: path.write_bytes(b"no image at all"), "not a readable image"),
    "empty": (lambda path: path.write_bytes(b""), "the image file is empty"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-60]), "damaged|not a readable image"),
}


def spoil_image(data: Path, change: Callable[[Path], object]) -> tuple[str, str]:
    """Spoil the image of one record; the ids and the name of the image."""
    entry = json.loads((data / "instructions.json").read_text())[1]
    change(data / entry["image"])
    return entry["id"], entry["image"]


@pytest.mark.parametrize("kind", IMAGES)
def test_a_bad_image(stage: Stage, complaint: Callable[..., str], data: Path, kind: str) -> None:
    change, words = IMAGES[kind]
    record_id, image = spoil_image(data, change)
    said = complaint("train", stage("run"), *overrides(data))
    assert "records read are bad, more than max_bad_rate 0.0 allows" in said.splitlines()[0]
    assert any(word in said for word in words.split("|"))
    assert record_id in said
    assert image in said


@pytest.mark.parametrize("kind", IMAGES)
def test_one_bad_image_does_not_stop_a_run_and_is_written_down(
    stage: Stage, data: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    record_id, image = spoil_image(data, IMAGES[kind][0])
    config = stage("run")
    assert main(["train", str(config), *overrides(data, rate=0.001)]) == 0
    noted = [
        json.loads(line) for line in (config.with_suffix("") / "bad_records.jsonl").read_text().splitlines()
    ]
    assert record_id in {entry["id"] for entry in noted}
    assert any(image in entry["reason"] for entry in noted)
    listing = config.with_suffix("") / "bad_records.jsonl"
    assert f"1 bad records were skipped; they are listed in {listing}" in capsys.readouterr().err


def test_an_image_that_leaves_the_root_through_a_link(
    stage: Stage, complaint: Callable[..., str], data: Path, tmp_path: Path
) -> None:
    def link(path: Path) -> None:
        path.rename(tmp_path / "outside")
        path.symlink_to(tmp_path / "outside")

    record_id, _ = spoil_image(data, link)
    said = complaint("train", stage("run"), *overrides(data))
    assert "through a symbolic link" in said
    assert record_id in said


def test_wrong_paths_are_said_before_a_model_is_read(
    stage: Stage, complaint: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(build_train, "student_in", refuse)
    monkeypatch.setattr(build_check, "student_in", refuse)
    assert "no data file" in complaint("train", stage("one"), "--data.path=/no/file.json")
    assert "no data file" in complaint("check", stage("one"), "--data.path=/no/file.json")
    assert "/no/teacher does not exist" in complaint(
        "train", stage("two"), "--teacher.checkpoint=/no/teacher"
    )


def test_a_layer_that_the_tower_does_not_have(
    stage: Stage, complaint: Callable[..., str], student_dir: Path, tmp_path: Path
) -> None:
    deep = shutil.copytree(student_dir, tmp_path / "deep")
    settings = json.loads((deep / "config.json").read_text())
    (deep / "config.json").write_text(json.dumps({**settings, "vision_feature_layer": -20}))
    said = complaint("train", stage("run", distilled=False), f"--student.checkpoint={deep}")
    assert "vision_feature_layer is -20, but the tower has" in said


def test_a_tracker_that_does_not_start(
    stage: Stage, complaint: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    said = complaint("train", stage("run", distilled=False), "--log.wandb_project=x")
    assert "`log.wandb_project`: wandb does not start: No API key configured." in said
    assert "WANDB_MODE=offline needs no account" in said


def test_missing_data(stage: Stage, complaint: Callable[..., str], data: Path) -> None:
    assert "no data file" in complaint("train", stage("one"), *overrides(data), "--data.path=/no/file.json")
    assert "no image folder" in complaint("train", stage("two"), *overrides(data), "--data.images=/no/images")


@pytest.mark.parametrize("path", ["no.json", "no.tar", "no.parquet"])
def test_missing_data_of_a_relative_path_says_where_it_was_looked_for(
    stage: Stage, complaint: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str
) -> None:
    config = stage("one", distilled=False)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    said = complaint("train", config, f"--data.path={path}", "--data.images=null")
    assert path in said
    assert f"(looked for from {elsewhere}, where the command was given)" in said
    said = complaint("train", config, "--data.images=pictures")
    assert f"pictures (looked for from {elsewhere}, where the command was given)" in said


# Results ----


def test_a_mended_command_may_use_the_directory_that_the_mistake_made(
    stage: Stage, complaint: Callable[..., str], data: Path
) -> None:
    """Nothing was trained yet, so nothing can be mixed up."""
    config = stage("run")
    complaint("train", config, *overrides(data), "--data.path=/no/file.json")
    assert main(["train", str(config), *overrides(data)]) == 0


def test_a_results_directory_that_holds_another_run(
    stage: Stage, complaint: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = stage("run", max_steps=1)
    assert main(["train", str(config)]) == 0
    said = complaint("train", config, "--seed=1")
    assert "already contains another run" in said
    assert "choose a new output_dir or remove it" in said
    assert main(["train", str(config), "--log.every=5"]) == 0  # the same run, logged otherwise
    assert "is complete: nothing to do" in capsys.readouterr().err


def test_a_results_directory_that_holds_something_else(stage: Stage, complaint: Callable[..., str]) -> None:
    config = stage("run")
    config.with_suffix("").mkdir()
    (config.with_suffix("") / "thesis.tex").write_text("precious")
    assert "is not empty and contains no run; choose a new output_dir" in complaint("train", config)
    assert (config.with_suffix("") / "thesis.tex").read_text() == "precious"


# Other commands ----


def test_evaluation_of_what_is_not_there(
    complaint: Callable[..., str], shapes_dir: Path, tmp_path: Path
) -> None:
    test = shapes_dir / "test.json"
    complaint("eval", "--model", tmp_path / "none", "--data", test, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    "words", [("check", "x.yaml", "--ranks=0"), ("eval", "--batch_size=-1"), ("eval", "--limit=x")]
)
def test_a_number_that_must_be_positive(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert "must be a whole number, at least 1; got" in capsys.readouterr().err


def test_a_limit_without_a_benchmark(complaint: Callable[..., str], tmp_path: Path) -> None:
    words = ("eval", "--model", "M", "--data", "d.json", "--out", tmp_path, "--limit=3")
    assert "--limit needs --benchmark" in complaint(*words)


def test_a_stock_directory_needs_no_conversion(
    complaint: Callable[..., str], student_dir: Path, tmp_path: Path
) -> None:
    said = complaint("convert", student_dir, "--out", tmp_path / "out")
    assert "is a stock LLaVA directory already" in said


def test_words_that_a_command_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["report", "--run", "x", "--colour=red"])
    assert caught.value.code == 2
    assert "unknown arguments: --colour=red" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["destil"], ["train"]], ids=["none", "unknown", "no recipe"])
def test_usage_is_shown_for_a_command_line_that_is_none(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "usage: llava-kd" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["llava_kd", "llava_kd.cli"])
def test_a_reader_may_leave_before_the_end(module: str) -> None:
    line = f'set -o pipefail; "{sys.executable}" -m {module} config --markdown | head -n 1'
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "# Settings\n")
    assert "Broken" not in done.stderr
    assert "Exception" not in done.stderr
