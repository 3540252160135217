"""Data that models wrote: whose they are is recorded, and another teacher than their writer refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_llava import make_tiny_llava

from llava_kd.assembly.runs.written_by import check_lineage, checked_writers, writers
from llava_kd.assembly.settings import load
from llava_kd.cli import main
from llava_kd.evaluation.runner import model_fingerprint


def written(data: Path, out: Path, *models: Path, how: str = "label") -> Path:
    """The records of `data`, said to be answered by these models in turn."""
    entries = json.loads(data.read_text())
    for number, entry in enumerate(entries):
        model = models[number % len(models)]
        entry["elicited"] = {"how": how, "model": str(model), "model_hash": model_fingerprint(model)}
    out.write_text(json.dumps(entries))
    return out


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("stranger") / "model", seed=9)


def of(stage, data: Path, name: str = "run", **more: Any) -> Path:
    path = stage(name, **more)
    tree = yaml.safe_load(path.read_text())
    tree["data"]["path"] = str(data)
    path.write_text(yaml.safe_dump(tree))
    return path


def test_answers_of_the_student_and_of_the_teacher_are_recorded(
    stage, shapes_dir: Path, student_dir: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    data = written(shapes_dir / "instructions.json", tmp_path / "both.json", student_dir, teacher_dir)
    path = of(stage, data, max_steps=1)
    assert main(["train", str(path)]) == 0
    record = json.loads((path.with_suffix("") / "run.json").read_text())
    assert [(one["role"], one["model"]) for one in record["written_by"]] == [
        ("student", str(student_dir)),
        ("teacher", str(teacher_dir)),
    ]
    plain = of(stage, shapes_dir / "instructions.json", "plain", max_steps=1)
    assert main(["train", str(plain)]) == 0
    assert "written_by" not in json.loads((plain.with_suffix("") / "run.json").read_text())


def test_answers_of_another_model_are_refused_beside_a_teacher(
    stage, shapes_dir: Path, stranger: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = written(shapes_dir / "instructions.json", tmp_path / "strange.json", stranger)
    path = of(stage, data)
    for words in (["train", str(path)], ["train", str(path), "--dry_run"]):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert f"strange.json is by {stranger} (hash {model_fingerprint(stranger)}), the teacher is" in said
    alone = of(stage, data, "alone", distilled=False)
    assert [writer.role for writer in writers(load(alone))] == ["other"]


def test_what_filters_records_has_written_nothing(
    stage, shapes_dir: Path, student_dir: Path, stranger: Path, tmp_path: Path
) -> None:
    data = written(shapes_dir / "instructions.json", tmp_path / "filtered.json", stranger, how="agreement")
    assert writers(load(of(stage, data))) == []
    entries = json.loads(data.read_text())
    by_student = {"how": "label", "model": "s", "model_hash": model_fingerprint(student_dir)}
    for entry in entries:
        entry["elicited"]["of"] = by_student
    data.write_text(json.dumps(entries))
    assert [writer.role for writer in writers(load(of(stage, data)))] == ["student"]


def test_the_teacher_of_an_earlier_stage_must_be_that_of_this_one(
    stage, shapes_dir: Path, teacher_dir: Path, stranger: Path, tmp_path: Path
) -> None:
    """A stage on a model's answers, then one under another teacher: refused; under that model: not."""
    data = written(shapes_dir / "instructions.json", tmp_path / "theirs.json", stranger)
    first = of(stage, data, "first", distilled=False, max_steps=1)
    assert main(["train", str(first)]) == 0
    student = first.with_suffix("") / "model"
    words = [f"--student.checkpoint={student}"]
    second = load(of(stage, shapes_dir / "instructions.json", "second"), words)
    parent = {"run": "first", **json.loads((first.with_suffix("") / "run.json").read_text())}
    with pytest.raises(ValueError, match=r"first learned the answers of .*the teacher is"):
        check_lineage(second, parent)
    with pytest.raises(ValueError, match=r"first learned the answers of"):
        check_lineage(second, {"run": "between", "parent": parent})
    theirs = load(second_path := of(stage, shapes_dir / "instructions.json", "third"), words)
    theirs = load(second_path, [*words, f"--teacher.checkpoint={stranger}"])
    assert checked_writers(theirs, parent) == []
    assert main(["train", str(of(stage, shapes_dir / "instructions.json", "fourth")), *words]) == 2
