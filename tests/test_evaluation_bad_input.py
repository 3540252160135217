"""Evaluation of bad input: one line that says what to do, exit status 2, and no answer lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_benchmarks as tiny
from tiny_llava import make_tiny_llava
from tiny_towers import make_language_model, make_tower

from llava_kd.cli import main
from llava_kd.evaluation.answers import read_lines
from llava_kd.evaluation.benchmarks.base import Quirks
from llava_kd.evaluation.benchmarks.catalogue import BENCHMARKS
from llava_kd.models.checkpoint import compose, save_stock

TEN = "vqav2, gqa, vizwiz, scienceqa, textvqa, mme, mmbench, mmbench_cn, pope, mmmu"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("model") / "tiny", layers=1)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    tiny.write_gqa(tmp_path / "data")
    tiny.write_pope(tmp_path / "data")
    return tmp_path / "data"


def run(model: Path, root: Path, out: Path, benchmark: str, *more: str) -> int:
    words = [f"--model={model}", f"--benchmark={benchmark}", f"--data={root}", f"--out={out}"]
    return main(["eval", *words, "--max_new_tokens=2", *more])


def refused(model: Path, root: Path, benchmark: str, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """The line that a refused evaluation prints."""
    out = root.parent / "out"
    assert run(model, root, out, benchmark, *more) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("llava-kd ")]
    assert len(lines) == 1
    return lines[0].removeprefix("llava-kd eval: ")


def test_a_missing_file(model: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = root / "gqa/testdev_balanced_questions.json"
    path.unlink()
    said = refused(model, root, "pope,gqa", capsys)
    assert said == f"gqa needs {path}, which is not there; see eval/README.md for the layout"
    assert not list((root.parent / "out").rglob("answers*"))  # nothing was asked of the one that is whole


def test_two_releases_of_pope(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """2,910 questions in the random category, as in LLaVA's file, against 3,000 labels."""
    tiny.write_pope(tmp_path, per_category=2)
    rows = [
        {"question_id": k, "image": f"{k // 6}.jpg", "text": f"Is there a thing{k % 6} in the image?"}
        for k in range(3000)
    ]
    questions = [
        json.loads(line) for line in (tmp_path / "pope/llava_pope_test.jsonl").read_text().splitlines()
    ]
    others = [row for row in questions if row["category"] != "random"]
    asked = [row | {"question_id": 9000 + k, "category": "random"} for k, row in enumerate(rows[:2910])]
    tiny.write_lines(tmp_path / "pope/llava_pope_test.jsonl", [*asked, *others])
    labels = [row | {"label": ("yes", "no")[row["question_id"] % 2]} for row in rows]
    tiny.write_lines(tmp_path / "pope/coco/coco_pope_random.json", labels)
    said = refused(model, tmp_path, "pope", capsys)
    assert said == (
        f"{tmp_path}/pope/llava_pope_test.jsonl and {tmp_path}/pope/coco/coco_pope_random.json are of "
        "different releases: 90 labels have no question. The random category has 2,910 rows in one and "
        "3,000 in another; take the labels of POPE commit e3e39262 for LLaVA's question file"
    )
    tiny.write_lines(tmp_path / "pope/coco/coco_pope_random.json", labels[:2910])
    assert len(BENCHMARKS["pope"].read(tmp_path, Quirks())) == 2910 + len(others)


def test_annotations_without_answer_id(tmp_path: Path) -> None:
    """Ten plain humans stay ten: the official code makes one of them and scores 0. It is noted."""
    tiny.write_vqav2_val(tmp_path, answer_ids=False)
    benchmark = BENCHMARKS["vqav2_val"]
    questions = benchmark.read(tmp_path, Quirks())
    assert benchmark.score is not None
    right = {"262148000": "2", "262148001": "yes", "262148002": "Red bus."}
    score = benchmark.score(tmp_path, questions, right, Quirks())
    assert score.value == 100
    (note,) = [note for note in score.notes if "answer_id" in note]
    assert note.startswith("3 annotations lack answer_id")


def test_an_unreadable_image_and_nothing_lost(
    model: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = root / "gqa/images/n2.jpg"
    whole = path.read_bytes()
    path.write_bytes(whole[:40])
    said = refused(model, root, "gqa", capsys, "--batch_size=1")
    assert said.startswith(f"question '202': cannot read {path}: ")
    assert said.endswith("; mend or replace it")
    answers = root.parent / "out/gqa/answers.jsonl"
    before = answers.read_text()
    assert [answer["id"] for answer in read_lines(answers)] == ["200", "201"]
    path.write_bytes(whole)
    assert run(model, root, root.parent / "out", "gqa", "--batch_size=1") == 0
    assert answers.read_text().startswith(before)
    assert len(read_lines(answers)) == 3


def test_a_missing_image_stops_before_the_model_is_loaded(
    model: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = root / "gqa/images/n1.jpg"
    path.unlink()
    (model / "model.safetensors").rename(model / "aside.safetensors")
    try:
        said = refused(model, root, "gqa", capsys)
    finally:
        (model / "aside.safetensors").rename(model / "model.safetensors")
    assert "1 images are missing; check the image root:" in said


def test_answers_cut_in_the_middle_of_a_line(
    model: Path, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As a kill leaves them: the whole lines stay as they are, the cut one is asked again."""
    out = root.parent / "out"
    assert run(model, root, out, "gqa") == 0
    answers = out / "gqa/answers.jsonl"
    whole = answers.read_bytes()
    lines = whole.splitlines(keepends=True)
    answers.write_bytes(b"".join(lines[:-1]) + lines[-1][:25])
    assert run(model, root, out, "gqa") == 0
    assert answers.read_bytes() == whole
    assert f"{answers} ends in the middle of a line (25 bytes): dropped, it is asked again" in caplog.text


def test_an_unknown_benchmark_lists_the_ten(
    model: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(model, root, "pope,mmvet", capsys)
    assert said.startswith(f"no benchmark 'mmvet'; the ten are {TEN}, other splits ")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "no model directory {}"),
        ({}, "{} has no config.json; give a directory that save_pretrained wrote"),
        (
            {"config.json": '{"model_type": "llava_qwen2"}'},
            "{} must hold a stock LLaVA model (model_type 'llava' in config.json), got 'llava_qwen2'; "
            "run `llava-kd convert` on a TinyLLaVA or LLaVA-1.5 directory first",
        ),
        ({"config.json": '{"model_type": "llava"}'}, "{} has no .safetensors weights"),
        ({"config.json": "{"}, "{}/config.json is not a model's configuration ("),
    ],
    ids=["nothing", "empty", "original LLaVA", "no weights", "half a config"],
)
def test_a_model_directory_that_is_not_stock(
    files: dict[str, str] | None, message: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "model"
    if files is not None:
        directory.mkdir()
        for name, text in files.items():
            (directory / name).write_text(text)
    said = refused(directory, root, "pope", capsys)
    assert said.startswith(message.format(directory))


def test_a_student_with_an_adapted_tower_answers(root: Path, tmp_path: Path) -> None:
    """No stock class holds its tower, but this package does."""
    line = make_tower("timm-convnext", tmp_path)
    llm = make_language_model("qwen2", tmp_path / "llm")
    parts = compose(vision_tower=line, language_model=str(llm))
    parts.processor.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    save_stock(parts, tmp_path / "student")
    assert run(tmp_path / "student", root, tmp_path / "out", "gqa") == 0
    assert len(read_lines(tmp_path / "out/gqa/answers.jsonl")) == 3
