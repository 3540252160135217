"""Taps under engines that shard and exchange: two ranks see and train what one device does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_kd.models.files.checkpoint import load_stock
from llava_kd.models.mllm import MLLM

pytestmark = pytest.mark.distributed
HERE = Path(__file__).parent


def update(kind: str, ranks: int, student: Path, out: Path) -> dict[str, torch.Tensor]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    path = os.pathsep.join([str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": path}
    command += [str(HERE / "tap_ranks.py"), kind, str(student), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
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
