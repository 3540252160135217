"""Changes of pictures on two ranks: what one device logs and learns, the augmentor's weights among it."""

from __future__ import annotations

import importlib.util
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


def state(output: Path) -> dict[str, torch.Tensor]:
    (last,) = sorted((output / "checkpoints").glob("step-*"))[-1:]
    return {n: t for file in last.glob("*.safetensors") for n, t in load_file(file).items()}


def logged(output: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "grad_norm", "response_kl", "mixed_tokens")
    return [{n: v for n, v in line.items() if n in names or n.startswith("hard_")} for line in lines]


@pytest.mark.parametrize("change", ["learning", "changed"])
def test_two_ranks_learn_changes_of_pictures_as_one_device_does(
    tmp_path: Path, shapes_dir: Path, student_dir: Path, teacher_dir: Path, change: str
) -> None:
    config = write_stage(tmp_path / "run", data=shapes_dir, student=student_dir, teacher=teacher_dir)
    asked = f"--pictures={CHANGES[change]}"
    ranks.train(config, tmp_path / "one", asked)
    ranks.train(config, tmp_path / "two", asked, *ranks.ENGINES["ddp"], ranks=2)
    assert_alike(tmp_path / "one", tmp_path / "two")
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    assert two.keys() == one.keys()
    name = "buffer/teaching.hard.augmentor.exp_avg_P"
    assert float((two[name] - one[name]).norm() / one[name].norm()) < 1e-2


def test_every_engine_mixes_the_same_pictures(
    tmp_path: Path, shapes_dir: Path, student_dir: Path, teacher_dir: Path
) -> None:
    """Pairs are those of a micro-batch, which ranks cut otherwise than one device does."""
    config = write_stage(tmp_path / "run", data=shapes_dir, student=student_dir, teacher=teacher_dir)
    kinds = ["ddp", "fsdp2"]
    if importlib.util.find_spec("deepspeed") is not None:
        kinds.append("zero3")
    for kind in kinds:
        ranks.train(config, tmp_path / kind, f"--pictures={CHANGES['mixup']}", *ranks.ENGINES[kind], ranks=2)
    assert any(0 < line["mixed_tokens"] < 1 for line in logged(tmp_path / "ddp"))
    for kind in kinds[1:]:
        assert_alike(tmp_path / "ddp", tmp_path / kind)
        assert int(state(tmp_path / kind)["buffer/teaching.mixup.steps"]) == 3


def assert_alike(one: Path, two: Path) -> None:
    expected, got = logged(one), logged(two)
    assert len(got) == len(expected) == 3
    for a, b in zip(expected, got, strict=True):
        assert b == pytest.approx(a, rel=2e-3, abs=1e-5)
