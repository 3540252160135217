"""How far the updates of a run go, and when it saves, logs and evaluates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """`num_steps` updates, each at `base_lr` times the multiplier of its number from 0, its gradient clipped.

    `lr_of_part`: the base rates of trained parts, where they are not all `base_lr`, for the log.
    """

    num_steps: int
    base_lr: float
    lr_multiplier: Callable[[int], float]
    max_grad_norm: float = 1.0
    lr_of_part: Mapping[str, float] = field(default_factory=dict)

    def rates(self, step: int) -> dict[str, float]:
        """What update `step` is logged with."""
        multiplier = self.lr_multiplier(step)
        parts = {f"lr/{part}": lr * multiplier for part, lr in self.lr_of_part.items()}
        return {"lr": self.base_lr * multiplier, **parts}


@dataclass(frozen=True, kw_only=True)
class Cadence:
    """After how many steps each is done, and at the end; evaluation and diagnosis never at 0.

    Step 1 is diagnosed too: it says where training starts, and what a diagnosis takes is known at once.
    """

    save_every: int = 500
    log_every: int = 10
    evaluate_every: int = 0
    diagnose_every: int = 0

    def saves(self, done: int, end: int) -> bool:
        return done % self.save_every == 0 or done == end

    def logs(self, done: int, end: int) -> bool:
        return done % self.log_every == 0 or done == end or self.diagnoses(done, end)

    def evaluates(self, done: int, end: int) -> bool:
        return self.evaluate_every > 0 and (done % self.evaluate_every == 0 or done == end)

    def diagnoses(self, done: int, end: int) -> bool:
        return self.diagnose_every > 0 and (done % self.diagnose_every == 0 or done in (1, end))


def cosine_with_warmup(step: int, *, num_steps: int, warmup_ratio: float) -> float:
    """Multiplier of update `step` (from 0): linear from near 0 to 1, then a half cosine down to 0."""
    warmup = math.ceil(num_steps * warmup_ratio)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, num_steps - warmup)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
