"""One update of a student whose loss is of tapped states, under a named engine: what test_taps.py starts.

Rank 0 writes the weights after it, and the loss.

Shape legend: I images, N tokens of an image, E tower width.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_batches import inputs, record
from torch import Tensor, nn

from llava_kd.batch import Inputs
from llava_kd.models.files.checkpoint import load_stock
from llava_kd.models.language_model import checkpoint_activations
from llava_kd.models.mllm import MLLM
from llava_kd.models.taps import Tap, Taps
from llava_kd.parallel.engine import AdamWSettings, ParameterGroup
from llava_kd.parallel.torch_engine import TorchEngine
from llava_kd.parallel.world import join

TAPS = [
    Tap("language_model.layers.0.self_attn"),
    Tap("language_model.layers.1"),
    Tap("multi_modal_projector"),
]
RECORDS = [record(1), record(2, images=2), record(3, prompt=9), record(4, images=0)]


class Watched(nn.Module):
    """The squares of the tapped states, summed: a loss that any cut into ranks adds up to."""

    def __init__(self, mllm: MLLM) -> None:
        super().__init__()
        self.mllm = mllm
        self._taps = Taps(mllm.stock, TAPS)

    def forward(self, batch: Inputs, features_INE: Tensor) -> Tensor:
        with self._taps.watch() as seen:
            prediction = self.mllm(batch, features_INE)
        zero = 0.0 * (prediction.hidden_BTD.sum() + prediction.head_VD.sum())
        return zero + torch.stack([value.float().square().sum() for value in seen.values()]).sum() / 1000


def main(kind: str, student: str, out: str) -> None:
    world = join("cpu", timeout_minutes=2)
    mllm = MLLM(load_stock(student).stock, trainable=("multi_modal_projector", "language_model"))
    checkpoint_activations(mllm.stock)
    module = Watched(mllm).train()
    group = ParameterGroup(names=tuple(n for n, p in module.named_parameters() if p.requires_grad), lr=1e-2)
    if kind == "zero3":
        from llava_kd.parallel.deepspeed_engine import DeepSpeedEngine, Zero

        accumulation = len(RECORDS) // world.size
        zero = Zero(stage=3, max_grad_norm=1.0, micro_batch_size=1, accumulation=accumulation)
        engine = DeepSpeedEngine(module, [group], world=world, zero=zero, adamw=AdamWSettings(), bf16=False)
    else:
        units = [*mllm.language_model.layers, mllm.multi_modal_projector]
        engine = TorchEngine(
            module, [group], world=world, kind=kind, adamw=AdamWSettings(), bf16=False, shard_units=units
        )
    mine = RECORDS[world.rank :: world.size]
    total = torch.zeros(())
    for index, item in enumerate(mine):
        batch = inputs(item)
        is_last = index == len(mine) - 1
        loss = engine.forward(batch, mllm.image_features(batch), is_last=is_last)
        engine.backward(loss, is_last=is_last)
        total += loss.detach()
    engine.step(lr_multiplier=1.0, max_grad_norm=1.0)
    total = world.sum(total)
    weights = engine.parameters()
    if world.is_main:
        save_file({n: t.float().contiguous() for n, t in weights.items()} | {"loss": total}, Path(out))
