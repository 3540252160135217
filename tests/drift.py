"""A rank whose weights change by themselves, as a faulty device's do."""

from __future__ import annotations

import sys
from typing import Any

import torch

from llava_kd.cli import main
from llava_kd.training import trainer


def train_drifting(rank: str, step: str, part: str, *words: str) -> None:
    """`llava-kd` with the words; on that rank one bit of a number of `part` flips after that step."""
    begin = trainer.Trainer.step

    def drifting(self: trainer.Trainer, batches: Any, number: int) -> trainer.StepResult:
        result = begin(self, batches, number)
        if self._engine.world.rank == int(rank) and number + 1 == int(step):
            (weight,) = [w for name, w in self._engine.replicas().items() if name.endswith(part)]
            with torch.no_grad():
                weight.view(torch.int32).flatten()[3] ^= 1
        return result

    trainer.Trainer.step = drifting  # type: ignore[method-assign]
    sys.exit(main(list(words)))
