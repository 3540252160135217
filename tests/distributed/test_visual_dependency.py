"""Tokens that need the picture, weighed on two ranks: what a record's tokens weigh is that of one device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ranks
from tiny_runs import write_stage

pytestmark = pytest.mark.distributed
NAMES = ("loss", "grad_norm", "response_kl", "visual_dependency", "visual_tokens_share")


def logged(output: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in NAMES} for line in lines]


def test_two_ranks_weigh_tokens_as_one_device(
    tmp_path: Path, shapes_dir: Path, student_dir: Path, teacher_dir: Path
) -> None:
    """With the further target, for which every rank asks its student without the picture."""
    config = write_stage(
        tmp_path / "run", data=shapes_dir, student=student_dir, teacher=teacher_dir, max_steps=2
    )
    asked = "--teacher.visual_dependency={by: vds, top: 0.3, mass: 1.0, gamma: 0.5}"
    ranks.train(config, tmp_path / "one", asked)
    ranks.train(config, tmp_path / "two", asked, *ranks.ENGINES["ddp"], ranks=2)
    expected, got = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert len(got) == len(expected) == 2
    for a, b in zip(expected, got, strict=True):
        assert b == pytest.approx(a, rel=1e-3, abs=1e-5)
        assert 0 < a["visual_tokens_share"] < 1
