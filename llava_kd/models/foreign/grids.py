"""Where the visual tokens of a picture lie in a model that has its own processor: only where that is sure.

Two things must hold: the family lays the features of a picture row by row, which a table says, and the
processor, as it is set, makes the same square number of every picture, which is tried.
"""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig, ProcessorMixin

from llava_kd.models.towers.visual_grid import VisualGrid

_ROW_BY_ROW = ("gemma3", "idefics3", "internvl", "smolvlm")  # by `model_type`; one tile a picture
_SIZES = ((336, 336), (200, 640), (900, 300))  # width and height of the pictures that are tried


def foreign_grid(config: PreTrainedConfig, processor: ProcessorMixin) -> VisualGrid | None:
    """None where pictures have several tiles, sizes of their own, or an order that is not known."""
    if config.model_type not in _ROW_BY_ROW:
        return None
    call: Any = processor
    counts = set()
    for size in _SIZES:
        picture = Image.new("RGB", size, (90, 140, 200))
        given = call(text=[call.image_token], images=[[picture]], return_tensors="pt")
        counts.add(int(is_visual(config, given["input_ids"]).sum()))
    (count, *others) = counts
    side = isqrt(count)
    if others or side * side != count:
        return None
    return VisualGrid(rows=side, columns=side)


def is_visual(config: PreTrainedConfig, ids: Tensor) -> Tensor:
    """Which tokens hold features of a picture."""
    token = visual_token(config)
    return torch.zeros_like(ids, dtype=torch.bool) if token is None else ids == token


def visual_token(config: PreTrainedConfig) -> int | None:
    token = getattr(config, "image_token_id", None)
    return token if isinstance(token, int) else None
