"""Rows of encoded records to the tensors of one model's `Inputs`.

Shape legend: B rows, T tokens, I images, H height, W width, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from llava_kd.batch import IGNORE_INDEX, Inputs
from llava_kd.data.images import ImageTransform
from llava_kd.data.template import Encoded


@dataclass(frozen=True, kw_only=True)
class Item:
    """One record ready to be laid into a row; `images` are resized uint8 [H, W, C]."""

    encoded: Encoded
    images: tuple[Tensor, ...]
    is_valid: bool


@dataclass(frozen=True, kw_only=True)
class Rows:
    """`Inputs` before the pixels are normalised: small enough to pass between processes."""

    input_ids_BT: Tensor
    labels_BT: Tensor
    position_ids_BT: Tensor
    segment_ids_BT: Tensor
    visual_BT: Tensor
    images_IHWC: Tensor
    image_is_valid_I: Tensor
    is_packed: bool

    def inputs(self, transform: ImageTransform, device: torch.device) -> Inputs:
        """`Inputs` on the device."""
        tensors = {
            f.name: getattr(self, f.name).to(device, non_blocking=True)
            for f in fields(self)
            if f.name not in ("images_IHWC", "is_packed")
        }
        images_IHWC = self.images_IHWC.to(device, non_blocking=True)
        return Inputs(**tensors, pixels_ICHW=transform.normalise(images_IHWC), is_packed=self.is_packed)


def masked(item: Item) -> Item:
    """The item in its place, but trained on nowhere."""
    labels = torch.full_like(item.encoded.labels, IGNORE_INDEX)
    return replace(item, encoded=replace(item.encoded, labels=labels), is_valid=False)


def collate(rows: Sequence[Sequence[Item]], *, pad_id: int, size: tuple[int, int]) -> Rows:
    """Lay each row's items one after the other and pad the rows on the right to the longest.

    Padding is a segment of its own, number 0, with positions that start again.
    """
    length = max(sum(len(item.encoded.ids) for item in row) for row in rows)
    shape = (len(rows), length)
    input_ids_BT = torch.full(shape, pad_id)
    labels_BT = torch.full(shape, IGNORE_INDEX)
    position_ids_BT = torch.zeros(shape, dtype=torch.long)
    segment_ids_BT = torch.zeros(shape, dtype=torch.long)
    visual_BT = torch.zeros(shape, dtype=torch.bool)
    for b, row in enumerate(rows):
        start = 0
        for number, item in enumerate(row, start=1):
            stop = start + len(item.encoded.ids)
            input_ids_BT[b, start:stop] = item.encoded.ids
            labels_BT[b, start:stop] = item.encoded.labels
            visual_BT[b, start:stop] = item.encoded.visual
            position_ids_BT[b, start:stop] = torch.arange(stop - start)
            segment_ids_BT[b, start:stop] = number
            start = stop
        position_ids_BT[b, start:] = torch.arange(length - start)
    items = [item for row in rows for item in row]
    images = [image for item in items for image in item.images]
    valid = [item.is_valid for item in items for _ in item.images]
    return Rows(
        input_ids_BT=input_ids_BT,
        labels_BT=labels_BT,
        position_ids_BT=position_ids_BT,
        segment_ids_BT=segment_ids_BT,
        visual_BT=visual_BT,
        images_IHWC=torch.stack(images) if images else torch.zeros(0, *size, 3, dtype=torch.uint8),
        image_is_valid_I=torch.tensor(valid, dtype=torch.bool),
        is_packed=any(len(row) > 1 for row in rows),
    )
