"""The connector over a grid under every engine: the losses of one rank, also where a batch has no image."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ranks
import torch
from safetensors.torch import load_file
from tiny_llava import make_tiny_llava
from tiny_runs import write_stage

from llava_kd.models.files.checkpoint import load_stock, save_stock
from llava_kd.models.projectors.on_a_grid import with_conv_attention

pytestmark = pytest.mark.distributed

ENGINES = {name: ranks.ENGINES[name] for name in ("ddp", "fsdp2", "zero2", "zero3")}
CASES = [pytest.param(name, marks=() if name == "fsdp2" else pytest.mark.slow) for name in ENGINES]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, shapes_dir: Path) -> Path:
    """Records of which two in three have no image, and a connector all of whose weights count."""
    root = tmp_path_factory.mktemp("connector")
    entries = json.loads((shapes_dir / "instructions.json").read_text())[:24]
    for number, entry in enumerate(entries):
        if number % 3:
            entry.pop("image")
            for turn in entry["conversations"]:
                turn["value"] = turn["value"].replace("<image>", "").strip()
    (root / "records.json").write_text(json.dumps(entries))
    parts = with_conv_attention(load_stock(str(make_tiny_llava(root / "own", hidden=32))), seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in parts.stock.model.multi_modal_projector.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    save_stock(parts, root / "student")
    return write_stage(
        root / "stage",
        data=shapes_dir,
        student=root / "student",
        teacher=None,
        distilled=False,
        trainable=("multi_modal_projector",),
        micro_batch_size=1,
        max_steps=4,
    )


def run(config: Path, output: Path, *overrides: str, num_ranks: int) -> tuple[list[float], dict]:
    data = f"--data.path={config.parent / 'records.json'}"
    ranks.train(config, output, data, *overrides, ranks=num_ranks)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines], load_file(output / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def alone(config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict]:
    return run(config, tmp_path_factory.mktemp("alone") / "run", num_ranks=1)


@pytest.mark.parametrize("engine", CASES)
def test_every_engine_trains_it_alike(
    config: Path, alone: tuple[list[float], dict], engine: str, tmp_path: Path
) -> None:
    losses, weights = alone
    assert len(losses) == 4
    got_losses, got = run(config, tmp_path / "run", *ENGINES[engine], num_ranks=2)
    assert got_losses == pytest.approx(losses, rel=1e-5)
    for name, tensor in weights.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
