"""Taps under engines that shard and exchange: two ranks see and train what one device does."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks
import tap_ranks
import torch
from safetensors.torch import load_file

from llava_kd.models.files.checkpoint import load_stock
from llava_kd.models.mllm import MLLM

pytestmark = pytest.mark.distributed


def update(kind: str, count: int, student: Path, out: Path) -> dict[str, torch.Tensor]:
    words = [kind, str(student), str(out)]
    ended = ranks.Ranks(words, out.with_name("logs"), ranks=count, function=tap_ranks.main).wait()
    assert set(ended.codes) == {0}, ended.log
    return load_file(out)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, student_dir: Path) -> dict[str, torch.Tensor]:
    updated = update("single", 1, student_dir, tmp_path_factory.mktemp("taps") / "one.safetensors")
    before = dict(MLLM(load_stock(str(student_dir)).stock).named_parameters())
    moved = [not torch.equal(updated[f"mllm.{name}"], tensor) for name, tensor in before.items()]
    assert sum(moved) > len(moved) / 2  # so that equal weights below are those of a training
    return updated


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero3"])
def test_a_loss_on_tapped_states_trains_the_same_on_two_ranks(
    kind: str, alone: dict[str, torch.Tensor], student_dir: Path, tmp_path: Path
) -> None:
    if kind == "zero3":
        pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")
    two = update(kind, 2, student_dir, tmp_path / "two.safetensors")
    assert two.keys() == alone.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-5, msg=name)
