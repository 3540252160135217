"""Learning-rate multiplier as a pure function of the step."""

from __future__ import annotations

import math


def cosine_with_warmup(step: int, *, num_steps: int, warmup_ratio: float) -> float:
    """Multiplier of update `step` (from 0): linear from near 0 to 1, then a half cosine down to 0."""
    warmup = math.ceil(num_steps * warmup_ratio)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, num_steps - warmup)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
