"""Answers of the student's own on two ranks: each writes for its records, and one device learns the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ranks
from served_student import ServedStudent, WritingHandler
from served_teacher import running
from tiny_runs import write_stage

pytestmark = pytest.mark.distributed


def logged(output: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "grad_norm", "response_kl", "cross_entropy", "own_answers", "teacher_cross_entropy")
    return [{name: line[name] for name in names} for line in lines]


def one_device(folder: Path, parts: dict[str, Path], **asked: float) -> Path:
    """Settings of a stage with own answers, trained into `one`."""
    config = write_stage(folder / "run", **parts, on_policy={"share": 0.6, **asked}, max_steps=4)
    ranks.train(config, folder / "one")
    return config


def same_lines(folder: Path) -> list[dict[str, float]]:
    """What `one` logged, which is what `two` logged."""
    expected, got = logged(folder / "one"), logged(folder / "two")
    assert len(got) == len(expected) == 4
    for a, b in zip(expected, got, strict=True):
        assert b == pytest.approx(a, rel=2e-3, abs=1e-5)
    return expected


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", pytest.param("zero2", marks=pytest.mark.slow), "zero3"])
def test_two_ranks_learn_from_the_answers_of_one_device(
    tmp_path: Path, shapes_dir: Path, student_dir: Path, teacher_dir: Path, kind: str
) -> None:
    if kind.startswith("zero"):
        pytest.importorskip("deepspeed")
    parts = {"data": shapes_dir, "student": student_dir, "teacher": teacher_dir}
    config = one_device(tmp_path, parts, max_new_tokens=5)
    ranks.train(config, tmp_path / "two", *ranks.ENGINES[kind], ranks=2)
    expected = same_lines(tmp_path)
    assert {line["own_answers"] for line in expected} == {0.0, 1.0}


@pytest.mark.slow
def test_two_sharded_ranks_learn_from_a_server_what_one_device_learns_alone(
    tmp_path: Path, shapes_dir: Path, student_dir: Path, teacher_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    parts = {"data": shapes_dir, "student": student_dir, "teacher": teacher_dir}
    config = one_device(tmp_path, parts, max_new_tokens=5, temperature=0.0)
    with running(ServedStudent(student_dir), WritingHandler) as served:
        words = [*ranks.ENGINES["fsdp2"], f"--on_policy.server={{url: {served.url}}}"]
        ranks.train(config, tmp_path / "two", *words, ranks=2)
    lines = same_lines(tmp_path)
    assert len(served.read) == sum(line["own_answers"] for line in lines)  # one rank gives it weights
