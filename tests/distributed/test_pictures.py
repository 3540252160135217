"""Changes of pictures on two ranks: what one device logs and learns, the augmentor's weights among it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ranks
import torch
from safetensors.torch import load_file
from tiny_runs import write_stage

pytestmark = pytest.mark.distributed

CHANGES = {
    "learning": "{hard: {lower: 0.0, upper: 100.0, keep_prompts: null, show_every: 0}}",
    "changed": "{hard: {lower: 0.0, upper: 1.0e-6, keep_prompts: null, show_every: 0}}",
    "mixup": "{mixup: {share: 0.5}}",
}
CASES = [("learning", "ddp"), ("changed", "ddp"), ("mixup", "ddp"), ("mixup", "fsdp2"), ("mixup", "zero3")]


def state(output: Path) -> dict[str, torch.Tensor]:
    (last,) = sorted((output / "checkpoints").glob("step-*"))[-1:]
    return {n: t for file in last.glob("*.safetensors") for n, t in load_file(file).items()}


def logged(output: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "grad_norm", "response_kl", "mixed_tokens")
    return [{n: v for n, v in line.items() if n in names or n.startswith("hard_")} for line in lines]


@pytest.mark.parametrize(("change", "engine"), CASES)
def test_two_ranks_change_pictures_as_one_device_does(
    tmp_path: Path, shapes_dir: Path, student_dir: Path, teacher_dir: Path, change: str, engine: str
) -> None:
    if engine == "zero3":
        pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")
    config = write_stage(tmp_path / "run", data=shapes_dir, student=student_dir, teacher=teacher_dir)
    asked = f"--pictures={CHANGES[change]}"
    ranks.train(config, tmp_path / "one", asked)
    ranks.train(config, tmp_path / "two", asked, *ranks.ENGINES[engine], ranks=2)
    expected, got = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert len(got) == len(expected) == 3
    for a, b in zip(expected, got, strict=True):
        assert b == pytest.approx(a, rel=2e-3, abs=1e-5)
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    assert two.keys() == one.keys()
    if change == "learning":
        moments = [each["buffer/teaching.hard.augmentor.exp_avg_P"] for each in (one, two)]
        assert float((moments[1] - moments[0]).norm() / moments[0].norm()) < 1e-2
