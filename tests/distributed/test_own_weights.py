"""Weights that a loss term brings are trained alike by every engine, and saved whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import extra_terms
import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import write_stage

pytestmark = pytest.mark.distributed

ENGINES = {
    "ddp": ["--engine.kind=ddp"],
    "fsdp2": ["--engine.kind=fsdp2"],
    "zero3": ["--engine.kind=deepspeed", "--engine.zero_stage=3"],
}
OWN = [
    f"--plugins=[{extra_terms.__file__}]",
    "--objective.mapped={weight: 0.5}",
    "--objective.layer_states={weight: 0.5}",
    "--objective.hint={weight: 0.5, student_taps: [language_model.layers.0]}",
    "--objective.visual_mi_alpha={weight: 0.1, teacher_taps: [language_model.layers.0]}",
    "--objective.exit_logits={weight: 0.5, gamma: 1.5, width: 16, stages: [1]}",
    "--objective.visual_exit_logits={weight: 0.5, layers: [], stages: [0, 1], width: 16}",
    "--trainable=[vision_tower, multi_modal_projector, language_model]",
    "--micro_batch_size=1",  # one record each, so that information is told apart in the same groups
]
NAMES = ("mapped.weight", "hint.0.weight", "visual_mi_alpha.0.baseline.0.weight", "exit_logits.0.down.weight")
NAMES += ("exit_logits.1.norm_of_words.weight", "visual_exit_logits.0.up.weight")


def train(config: Path, *words: str, ranks: int) -> dict[str, torch.Tensor]:
    """The state of the last checkpoint, without the steps of the optimiser."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "llava_kd.cli", "train", str(config), *OWN, *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (last,) = sorted((config.with_suffix("") / "checkpoints").glob("step-*"))[-1:]
    found = {n: t for file in last.glob("*.safetensors") for n, t in load_file(file).items()}
    return {name: tensor for name, tensor in found.items() if name.startswith("parameter/")}


@pytest.fixture(scope="module")
def one(
    tmp_path_factory: pytest.TempPathFactory, shapes_dir: Path, student_dir: Path, teacher_dir: Path
) -> dict[str, torch.Tensor]:
    parts = {"data": shapes_dir, "student": student_dir, "teacher": teacher_dir}
    return train(write_stage(tmp_path_factory.mktemp("one") / "one", **parts, max_steps=3), ranks=1)


@pytest.mark.parametrize("engine", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp2", "zero3"])
def test_two_ranks_train_own_weights_and_tapped_states_as_one_device_does(stage, one, engine: str) -> None:
    if engine == "zero3":
        pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")
    got = train(stage("two", max_steps=3), *ENGINES[engine], ranks=2)
    assert got.keys() == one.keys()
    assert {f"parameter/terms.{name}" for name in NAMES} <= got.keys()
    for name, tensor in got.items():
        if name.startswith("parameter/mllm.vision_tower.") and name.endswith("k_proj.bias"):
            continue  # no softmax feels it: its gradient is rounding alone, which Adam brings to full steps
        torch.testing.assert_close(tensor, one[name], rtol=1e-5, atol=1e-5, msg=name)
