"""Pictures with Gaussian noise of a given level, the same whenever and wherever they are opened."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

_ROWS = 256  # drawn at a time, so that a large picture costs no more memory than it has itself


@dataclass(frozen=True, kw_only=True)
class Noise:
    """`level` is the standard deviation as a share of the range of a pixel, from black to white.

    `seed`, the question's id and the number of its picture decide what is drawn, and the level how large it
    is: a picture has one pattern at all levels.
    """

    level: float
    seed: int = 0

    def __str__(self) -> str:
        return f"noise {self.level:g}, seed {self.seed}"

    def on(self, picture: Image.Image, question: str, number: int) -> Image.Image:
        """The picture with noise on every channel of every pixel, cut at black and white and rounded."""
        text = f"{self.seed} {number} {question}".encode("utf-8", "surrogatepass")
        generator = np.random.default_rng(int.from_bytes(hashlib.sha256(text).digest()[:8]))
        pixels = np.array(picture)
        for start in range(0, len(pixels), _ROWS):
            rows = pixels[start : start + _ROWS]
            drawn = generator.standard_normal(rows.shape, dtype=np.float32)
            rows[:] = (rows + 255 * self.level * drawn).round().clip(0, 255)
        return Image.fromarray(pixels)


def check_levels(levels: Sequence[float]) -> tuple[float, ...]:
    """The levels in rising order; ValueError for one that is no share, is none at all, or stands twice."""
    for level in levels:
        if not (math.isfinite(level) and 0 < level <= 1):
            raise ValueError(
                "a level of noise must be above 0 and at most 1, the range from black to white; got "
                f"{level:g} (pictures without noise are always evaluated)"
            )
    if len({f"{level:g}" for level in levels}) < len(levels):
        raise ValueError(f"levels of noise must differ; got {', '.join(f'{level:g}' for level in levels)}")
    return tuple(sorted(levels))
