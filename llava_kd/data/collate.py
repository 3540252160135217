"""Rows of encoded records to the tensors of one model's `Inputs`.

Shape legend: B rows, T tokens, I images, H height, W width, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from llava_kd.batch import IGNORE_INDEX, Places
from llava_kd.data.encoder import Encoded


@dataclass(frozen=True, kw_only=True)
class Item:
    """One record ready to be laid into a row; `images` are resized uint8 [H, W, C], or absent if left raw."""

    encoded: Encoded
    images: tuple[Tensor, ...]
    num_images: int
    is_valid: bool


@dataclass(frozen=True, kw_only=True)
class Rows:
    """`Inputs` before the pixels are normalised; `images_IHWC` has no image where they were left raw."""

    input_ids_BT: Tensor
    labels_BT: Tensor
    position_ids_BT: Tensor
    segment_ids_BT: Tensor
    visual_BT: Tensor
    images_IHWC: Tensor
    image_is_valid_I: Tensor
    places: Places
    is_packed: bool

    def pinned(self) -> Rows:
        """The same in page-locked memory, so that copying to a GPU does not wait."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)[:-2]}
        pinned = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        return replace(self, places=self.places.map(Tensor.pin_memory), **pinned)


@dataclass(frozen=True, kw_only=True)
class RawImages:
    """Decoded images of any sizes in one block of bytes."""

    block: Tensor
    sizes: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, images: Sequence[Tensor]) -> RawImages:
        empty = torch.zeros(0, dtype=torch.uint8)
        return cls(
            block=torch.cat([empty, *(image_HWC.flatten() for image_HWC in images)]),
            sizes=tuple((image_HWC.shape[0], image_HWC.shape[1]) for image_HWC in images),
        )

    def images(self) -> list[Tensor]:
        """uint8 [H, W, C] of each image, sharing the block's memory."""
        areas = [3 * height * width for height, width in self.sizes]
        parts = self.block.split(areas)
        return [part.view(*size, 3) for part, size in zip(parts, self.sizes, strict=True)]

    def to(self, device: torch.device) -> RawImages:
        return replace(self, block=self.block.to(device, non_blocking=True))

    def pinned(self) -> RawImages:
        return replace(self, block=self.block.pin_memory())


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
    valid = torch.tensor([item.is_valid for item in items for _ in range(item.num_images)], dtype=torch.bool)
    places = Places.find(
        labels_BT=labels_BT, visual_BT=visual_BT, position_ids_BT=position_ids_BT, image_is_valid_I=valid
    )
    return Rows(
        input_ids_BT=input_ids_BT,
        labels_BT=labels_BT,
        position_ids_BT=position_ids_BT,
        segment_ids_BT=segment_ids_BT,
        visual_BT=visual_BT,
        images_IHWC=torch.stack(images) if images else torch.zeros(0, *size, 3, dtype=torch.uint8),
        image_is_valid_I=valid,
        places=places,
        is_packed=any(len(row) > 1 for row in rows),
    )
