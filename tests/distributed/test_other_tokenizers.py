"""A teacher of another tokenizer on two ranks: stretches are counted over both, as one device counts them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ranks
from tiny_llava import make_tiny_llava, merged_tokenizer
from tiny_runs import write_stage

pytestmark = pytest.mark.distributed
NAMES = ("loss", "grad_norm", "response_cross", "response_cross/matched_mass", "teacher_cross_entropy")


def logged(output: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in NAMES} for line in lines]


def test_two_ranks_compare_stretches_as_one_device(
    tmp_path: Path, shapes_dir: Path, student_dir: Path
) -> None:
    teacher = make_tiny_llava(tmp_path / "foreign", hidden=48, vocab_size=352, tokenizer=merged_tokenizer())
    config = write_stage(
        tmp_path / "run",
        data=shapes_dir,
        student=student_dir,
        teacher=teacher,
        max_steps=2,
        objective={"cross_entropy": {"weight": 1.0}, "response_cross": {"weight": 1.0}},
    )
    ranks.train(config, tmp_path / "one")
    ranks.train(config, tmp_path / "two", *ranks.ENGINES["ddp"], ranks=2)
    expected, got = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert len(got) == len(expected) == 2
    for a, b in zip(expected, got, strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-6)
