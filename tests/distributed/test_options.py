"""Options beyond the paper on two ranks: what one device logs and learns, in every engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ranks
import torch
from safetensors.torch import load_file
from tiny_runs import write_stage

pytestmark = pytest.mark.distributed

ENGINES = {name: ranks.ENGINES[name] for name in ("ddp", "fsdp2", "zero3")}
FREE = "parameter/learned_weights.free_K"
OPTIONS = [
    "--objective.response_kl={trust: probability}",
    "--objective.visual_kl={share: 0.25}",
    "--objective.relation={centre: true, normalise_rows: true}",
    "--objective.text_relation={normalise_rows: true}",
    "--objective.learned_weights={strength: 0.5}",
]


def state(output: Path) -> dict[str, torch.Tensor]:
    (last,) = sorted((output / "checkpoints").glob("step-*"))[-1:]
    found = {n: t for file in last.glob("*.safetensors") for n, t in load_file(file).items()}
    return {name: tensor for name, tensor in found.items() if name.startswith("parameter/")}


def logged(output: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "grad_norm", "response_kl", "visual_kl", "relation", "text_relation")
    return [{n: v for n, v in line.items() if n in names or n.startswith("weight/")} for line in lines]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, shapes_dir: Path, student_dir: Path, teacher_dir: Path):
    """One device's run, and the YAML it came from."""
    root = tmp_path_factory.mktemp("options")
    config = write_stage(root / "one", data=shapes_dir, student=student_dir, teacher=teacher_dir, max_steps=3)
    ranks.train(config, root / "one", *OPTIONS)
    assert bool(state(root / "one")[FREE].ne(0).all())
    return config, root


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_train_options_and_learned_weights_as_one_device_does(alone, engine: str) -> None:
    config, root = alone
    if engine == "zero3":
        pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")
    ranks.train(config, root / engine, *OPTIONS, *ENGINES[engine], ranks=2)
    expected, got = (logged(root / name) for name in ("one", engine))
    assert len(got) == len(expected) == 3
    for a, b in zip(expected, got, strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-6)
        assert {"weight/response_kl", "weight/text_relation"} <= b.keys()
    weights = state(root / "one")
    found = state(root / engine)
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=2e-5, msg=name)
