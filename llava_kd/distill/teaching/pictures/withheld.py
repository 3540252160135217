"""Pictures that show little or nothing, to ask a model what it would say without them.

Shape legend: I images, C channels, H height, W width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from llava_kd.distill.teaching.pictures.warps import blurred

Withheld = Literal["grey", "pixelated", "blurred"]


def withheld(pixels_ICHW: Tensor, kind: Withheld, *, cells: int = 4) -> Tensor:
    """Other pixels of the same shape and type.

    `grey`: the mean colour, 0 of normalised pixels. `pixelated`: `cells` by `cells` squares of one colour
    each. `blurred`: by a Gaussian whose standard deviation is half of such a square.
    """
    if kind == "grey" or len(pixels_ICHW) == 0:
        return torch.zeros_like(pixels_ICHW)
    wide_ICHW = pixels_ICHW.float()
    height, width = pixels_ICHW.shape[2:]
    if kind == "pixelated":
        coarse = functional.adaptive_avg_pool2d(wide_ICHW, (min(cells, height), min(cells, width)))
        return functional.interpolate(coarse, size=(height, width), mode="nearest").to(pixels_ICHW.dtype)
    deviation = min(height, width) / (2 * cells)
    deviation_I = wide_ICHW.new_full((len(wide_ICHW),), deviation)
    return blurred(wide_ICHW, deviation_I, deviation).to(pixels_ICHW.dtype)
