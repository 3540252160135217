"""Engines on two CPU ranks give the losses and weights of one device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ranks
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed

ENGINES = {name: ranks.ENGINES[name] for name in ("ddp", "fsdp2", "zero3")}


def losses(output: Path) -> list[dict[str, float]]:
    terms = ("loss", "cross_entropy", "response_kl", "visual_kl", "relation", "grad_norm")
    logged = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in terms if name in line} for line in logged]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, shapes_dir: Path, student_dir: Path, teacher_dir: Path):
    """One-device run of the distilled stage, and the YAML it came from."""
    from tiny_runs import write_stage

    root = tmp_path_factory.mktemp("engines")
    config = write_stage(root / "one", data=shapes_dir, student=student_dir, teacher=teacher_dir, max_steps=4)
    ranks.train(config, root / "one")
    return config, root


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_give_the_losses_and_weights_of_one_device(runs, engine: str) -> None:
    config, root = runs
    if engine == "zero3":
        pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")
    ranks.train(config, root / engine, *ENGINES[engine], ranks=2)
    expected, got = losses(root / "one"), losses(root / engine)
    assert len(got) == len(expected) == 4
    for a, b in zip(expected, got, strict=True):
        assert b == pytest.approx(a, rel=1e-5, abs=1e-6)
    weights = load_file(root / "one" / "model" / "model.safetensors")
    for name, tensor in load_file(root / engine / "model" / "model.safetensors").items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-5, atol=1e-5, msg=name)
