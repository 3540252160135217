"""A partly trained tower under every engine: the losses of one rank, also where a batch has no image.

With layer -2 the tower's last block gets no gradient, nor does its front: no engine may wait for them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import ranks
import torch
from safetensors.torch import load_file
from tiny_llava import make_tiny_llava
from tiny_runs import write_stage

pytestmark = pytest.mark.distributed

ENGINES = {name: ranks.ENGINES[name] for name in ("ddp", "fsdp2", "zero2", "zero3")}
LAST = {"last layer": "--vision_tower_last_layers=1", "whole tower": "--vision_tower_last_layers=null"}

FAST = {("last layer", engine) for engine in ENGINES} | {("whole tower", "ddp"), ("whole tower", "zero3")}
CASES = [
    pytest.param(last, engine, marks=() if (last, engine) in FAST else pytest.mark.slow)
    for last in LAST
    for engine in ENGINES
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, shapes_dir: Path) -> Path:
    """Records of which two in three have no image."""
    root = tmp_path_factory.mktemp("tower")
    entries = json.loads((shapes_dir / "instructions.json").read_text())[:24]
    for number, entry in enumerate(entries):
        if number % 3:
            entry.pop("image")
            for turn in entry["conversations"]:
                turn["value"] = turn["value"].replace("<image>", "").strip()
    (root / "records.json").write_text(json.dumps(entries))
    student = make_tiny_llava(root / "student", tower_layers=3, hidden=32)
    return write_stage(
        root / "stage",
        data=shapes_dir,
        student=student,
        teacher=None,
        distilled=False,
        trainable=("vision_tower", "multi_modal_projector"),
        micro_batch_size=1,
        max_steps=6,
    )


def run(config: Path, output: Path, *overrides: str, num_ranks: int) -> tuple[list[float], dict]:
    data = f"--data.path={config.parent / 'records.json'}"
    ranks.train(config, output, data, *overrides, ranks=num_ranks)
    lines = (output / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]
    return losses, load_file(output / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def alone(
    config: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[list[float], dict]]:
    """What one rank makes of a tower of which so much is trained."""
    root = tmp_path_factory.mktemp("alone")
    return cache(lambda last: run(config, root / last.replace(" ", "_"), LAST[last], num_ranks=1))


@pytest.mark.parametrize(("last", "engine"), CASES)
def test_every_engine_trains_the_tower_alike(
    config: Path, alone: Callable[[str], tuple[list[float], dict]], last: str, engine: str, tmp_path: Path
) -> None:
    losses, weights = alone(last)
    assert len(losses) == 6
    got_losses, got = run(config, tmp_path / "run", LAST[last], *ENGINES[engine], num_ranks=2)
    assert got_losses == pytest.approx(losses, rel=1e-5)
    for name, tensor in weights.items():
        if not name.endswith("k_proj.bias"):  # its gradient is rounding alone, which Adam makes large
            torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
