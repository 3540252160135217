"""A term, a figure and a source of plug-ins on two ranks: the losses and weights of one device."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import ranks
import torch
import yaml
from extending_page import write_plugins
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed

FIGURES = ("loss", "cross_entropy", "mapped_states", "visual_norm", "grad_norm")


def metrics(output: Path) -> list[list[float]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [[line[name] for name in FIGURES] for line in lines]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model" / "model.safetensors")


@pytest.fixture
def config(stage: Callable[..., Path], tmp_path: Path, shapes_dir: Path) -> Path:
    pages = write_plugins(tmp_path)
    entries = json.loads((shapes_dir / "captions.json").read_text())
    lines = [f"{entry['image']}\t{entry['conversations'][-1]['value']}" for entry in entries]
    (tmp_path / "captions.tsv").write_text("\n".join(lines) + "\n")
    objective = {
        "cross_entropy": {"weight": 1.0},
        "mapped_states": {"weight": 0.5, "margin": 0.1},
        "visual_norm": {},
    }
    written = stage(
        "run",
        engine="auto",
        micro_batch_size=1,
        max_steps=4,
        plugins=[pages[f"my_{name}.py"] for name in ("terms", "figure", "source")],
        objective=objective,
        checkpoint={"every": 2, "keep": 5},
    )
    tree = yaml.safe_load(written.read_text())
    tree["data"] |= {"path": str(tmp_path / "captions.tsv"), "num_workers": 1, "template": "plain"}
    written.write_text(yaml.safe_dump(tree))
    return written


@pytest.mark.parametrize("name", ["ddp", pytest.param("zero3", marks=pytest.mark.slow)])
def test_every_engine_trains_logs_and_resumes_what_plug_ins_bring(
    config: Path, tmp_path: Path, name: str
) -> None:
    if name == "zero3":
        pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")
    ranks.train(config, tmp_path / "one")
    expected = metrics(tmp_path / "one")
    assert len(expected) == 4
    output = tmp_path / name
    ranks.train(config, output, *ranks.ENGINES[name], ranks=2)
    for got, want in zip(metrics(output), expected, strict=True):
        assert got == pytest.approx(want, rel=1e-4, abs=1e-6)
    for path, tensor in weights(output).items():
        torch.testing.assert_close(tensor, weights(tmp_path / "one")[path], rtol=1e-4, atol=1e-5)
    whole = weights(output)
    shutil.rmtree(output / "model")
    (output / "run.json").unlink()
    shutil.rmtree(output / "checkpoints" / "step-00000004")
    ranks.train(config, output, *ranks.ENGINES[name], ranks=2)
    assert all(torch.equal(tensor, whole[path]) for path, tensor in weights(output).items())
