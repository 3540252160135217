"""Teachings from outside the library on two ranks: the updates of one device, and figures that must agree."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import teaching_ranks
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed
HERE = Path(__file__).parent


def launch(teaching: str, kind: str, ranks: int, *words: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    path = os.pathsep.join([str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command += [str(HERE / "teaching_ranks.py"), teaching, kind, *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)


@pytest.mark.parametrize(("teaching", "kind"), [("peer", "ddp"), ("frame", "fsdp2")])
def test_two_ranks_train_what_one_does(
    teaching: str, kind: str, student_dir: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    alone, both = (tmp_path / f"{ranks}.safetensors" for ranks in (1, 2))
    teaching_ranks.main(teaching, "single", str(student_dir), str(teacher_dir), str(alone))
    done = launch(teaching, kind, 2, student_dir, teacher_dir, both)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = load_file(alone), load_file(both)
    assert any(name.startswith("teaching.") for name in one)
    assert two.keys() == one.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_a_figure_that_one_rank_alone_reports_is_named_on_both(
    student_dir: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    done = launch("uneven", "ddp", 2, student_dir, teacher_dir, tmp_path / "out.safetensors")
    assert done.returncode != 0
    message = "every rank must report the same figures of steps, but rank 0 lacks a_figure"
    assert done.stderr.count(f"ValueError: {message}") == 2, done.stderr[-3000:]
