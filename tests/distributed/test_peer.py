"""Two students of one run are trained alike by every engine that takes them, and saved whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_llava import make_tiny_llava
from tiny_runs import write_stage

pytestmark = pytest.mark.distributed
TERMS = {
    "cross_entropy": {"weight": 1.0},
    "response_kl": {"weight": 1.0, "trust": "better"},
    "visual_kl": {"weight": 1.0},
    "visual_hint": {"weight": 0.5, "kind": "cosine", "student_taps": ["multi_modal_projector"]},
    "visual_regions": {"weight": 0.5},
}


def train(config: Path, *words: str, ranks: int) -> dict[str, torch.Tensor]:
    """The weights of both finished students, and the state of the last checkpoint."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "llava_kd.cli", "train", str(config), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    run = config.with_suffix("")
    (last,) = sorted((run / "checkpoints").glob("step-*"))[-1:]
    files = {
        "state": last / "state.safetensors",
        **{n: run / n / "model.safetensors" for n in ("model", "peer")},
    }
    return {f"{file}: {n}": t for file, path in files.items() for n, t in load_file(path).items()}


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory, shapes_dir: Path, student_dir: Path):
    """The YAML of a stage whose students have two towers and two sizes."""
    folder = tmp_path_factory.mktemp("peer")
    peer = make_tiny_llava(folder / "start", hidden=40, layers=3, tower_hidden=48, vocab_size=280, seed=7)

    def written(name: str) -> Path:
        parts = {"data": shapes_dir, "student": student_dir, "teacher": None}
        config = write_stage(folder / name, **parts, distilled=False, max_steps=3)
        tree = yaml.safe_load(config.read_text())
        tree |= {"peer": {"checkpoint": str(peer)}, "objective": TERMS}
        config.write_text(yaml.safe_dump(tree))
        return config

    return written


@pytest.fixture(scope="module")
def one(write) -> dict[str, torch.Tensor]:
    return train(write("one"), ranks=1)


@pytest.mark.parametrize("engine", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"])
def test_two_ranks_train_both_students_as_one_device_does(write, one, engine: str) -> None:
    two = train(write(engine), f"--engine.kind={engine}", ranks=2)
    assert two.keys() == one.keys()
    for part in ("teaching.mllm.language_model", "teaching.terms.visual_hint", "terms.visual_hint"):
        assert any(name.startswith(f"state: parameter/{part}") for name in one), part
    for name, tensor in two.items():
        if "exp_avg" not in name:
            torch.testing.assert_close(tensor, one[name], rtol=1e-4, atol=1e-4, msg=name)
