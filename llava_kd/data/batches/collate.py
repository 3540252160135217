"""Rows of encoded records to the tensors of one model's `Inputs`.

Shape legend: B rows, T tokens, I images, H height, W width, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llava_kd.batch import IGNORE_INDEX, Places
from llava_kd.data.foreign.own_inputs import OwnInputs, stacked
from llava_kd.data.pixels.device_decode import decode_jpegs
from llava_kd.data.text.encoder import Encoded


@dataclass(frozen=True, kw_only=True)
class Item:
    """One record ready to be laid into a row; `images` are resized uint8 [H, W, C], or absent if left raw.

    `own`: of a model with a processor of its own, what that gave beside the tokens.
    """

    encoded: Encoded
    images: tuple[Tensor, ...]
    num_images: int
    is_valid: bool
    own: OwnInputs | None = None


@dataclass(frozen=True, kw_only=True)
class CollatedRows:
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
    scores_BT: Tensor | None = None
    own: Mapping[str, Tensor] | None = None
    stretches_BT: Tensor | None = None

    def pinned(self) -> CollatedRows:
        """The same in page-locked memory, so that copying to a GPU does not wait."""
        pinned = {name: t.pin_memory() for name, t in vars(self).items() if isinstance(t, Tensor)}
        own = None if self.own is None else {name: t.pin_memory() for name, t in self.own.items()}
        return replace(self, places=self.places.map(Tensor.pin_memory), own=own, **pinned)


@dataclass(frozen=True, kw_only=True)
class RawImages:
    """Images of any sizes in two blocks of bytes: `pixels` of those that are decoded, and `jpegs`.

    `shapes` are in the order of the images: [H, W, 3], or [number of bytes] of a JPEG.
    """

    pixels: Tensor
    jpegs: Tensor
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, images: Sequence[Tensor]) -> RawImages:
        """`images` are uint8: [H, W, 3], or [number of bytes]."""
        empty = torch.zeros(0, dtype=torch.uint8)
        return cls(
            pixels=torch.cat([empty, *(image.flatten() for image in images if image.dim() == 3)]),
            jpegs=torch.cat([empty, *(image for image in images if image.dim() == 1)]),
            shapes=tuple(tuple(image.shape) for image in images),
        )

    def images(self, device: torch.device) -> list[Tensor]:
        """uint8 [H, W, 3] of each image on `device`; ValueError if a JPEG cannot be decoded there."""
        parts = {
            number: block.split([math.prod(shape) for shape in self.shapes if len(shape) == number])
            for number, block in ((3, self.pixels.to(device, non_blocking=True)), (1, self.jpegs))
        }
        pixels = iter(parts[3])
        decoded = iter(decode_jpegs(parts[1], device))
        return [next(pixels).view(shape) if len(shape) == 3 else next(decoded) for shape in self.shapes]

    def pinned(self) -> RawImages:
        return replace(self, pixels=self.pixels.pin_memory())


def masked(item: Item) -> Item:
    """The item in its place, but trained on nowhere."""
    labels = torch.full_like(item.encoded.labels, IGNORE_INDEX)
    return replace(item, encoded=replace(item.encoded, labels=labels), is_valid=False)


def collate(rows: Sequence[Sequence[Item]], *, pad_id: int, size: tuple[int, int]) -> CollatedRows:
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
    scores_BT = torch.zeros(shape)
    stretches_BT = torch.zeros(shape, dtype=torch.long)
    num_stretches = 0
    for b, row in enumerate(rows):
        start = 0
        for number, item in enumerate(row, start=1):
            stop = start + len(item.encoded.ids)
            input_ids_BT[b, start:stop] = item.encoded.ids
            labels_BT[b, start:stop] = item.encoded.labels
            visual_BT[b, start:stop] = item.encoded.visual
            if item.encoded.scores is not None:
                scores_BT[b, start:stop] = item.encoded.scores
            if (own := item.encoded.stretches) is not None:
                stretches_BT[b, start:stop] = torch.where(own > 0, own + num_stretches, 0)
                num_stretches += int(own.max())
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
    return CollatedRows(
        input_ids_BT=input_ids_BT,
        labels_BT=labels_BT,
        position_ids_BT=position_ids_BT,
        segment_ids_BT=segment_ids_BT,
        visual_BT=visual_BT,
        images_IHWC=torch.stack(images) if images else torch.zeros(0, *size, 3, dtype=torch.uint8),
        image_is_valid_I=valid,
        places=places,
        is_packed=any(len(row) > 1 for row in rows),
        scores_BT=scores_BT if any(item.encoded.scores is not None for item in items) else None,
        stretches_BT=stretches_BT if num_stretches else None,
    )


def collate_foreign(items: Sequence[Item], *, pad_id: int) -> CollatedRows:
    """A row for each record of a model with a processor of its own, which knows no packed rows."""
    rows = collate([[item] for item in items], pad_id=pad_id, size=(0, 0))
    length = rows.input_ids_BT.shape[1]
    return replace(rows, own=stacked([item.own or OwnInputs() for item in items], length))
