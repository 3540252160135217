"""Packing of records into rows of bounded length.

A pack takes the longest record left, then records of about the length that would divide its room evenly, and
last the longest that still fits. On a LLaVA-like mixture this leaves about a hundredth of the room that
best-fit-decreasing leaves (`benchmarks/loader.py` measures both), since the last choice is among many.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

_POSITION_BITS = 32
# Records kept back for the next window, so that the last packs of a window have a choice too.
_CARRIED_SHARE = 1 / 16


@dataclass(frozen=True, kw_only=True)
class RecordSizes:
    """Tokens and images of every record, by its number."""

    tokens: np.ndarray
    images: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Rows hold several records, up to `max_tokens` and `max_images`, that are near each other in the order.

    `packs_per_step` is the global batch in rows. None takes as many as hold about `global_batch_size`
    records, rounded to the number of ranks; give it where runs with other numbers of ranks must agree.
    """

    max_tokens: int
    max_images: int = 64
    packs_per_step: int | None = None
    window: int = 4096


def pack(order: np.ndarray, sizes: RecordSizes, packing: Packing) -> list[list[int]]:
    """Packs that hold every record of `order` once. ValueError if a single record is over a budget."""
    for values, budget, what in (
        (sizes.tokens, packing.max_tokens, "tokens"),
        (sizes.images, packing.max_images, "images"),
    ):
        largest = int(np.argmax(values))
        if values[largest] > budget:
            raise ValueError(
                f"a pack may hold {budget} {what}, but record number {largest} alone has {values[largest]}; "
                f"raise packing.max_{what}"
            )
    keys = (sizes.tokens[order].astype(np.int64) << _POSITION_BITS) | np.arange(len(order))
    images = sizes.images[order].tolist()
    packs: list[list[int]] = []
    available: list[int] = []
    for start in range(0, len(order), packing.window):
        stop = start + packing.window
        available = sorted(available + keys[start:stop].tolist())
        kept_back = 0 if stop >= len(order) else int(packing.window * _CARRIED_SHARE)
        packs += _fill(available, images, packing, kept_back=kept_back)
    return [order[positions].tolist() for positions in packs]


def _fill(available: list[int], images: list[int], packing: Packing, *, kept_back: int) -> list[list[int]]:
    """Take packs of positions out of the sorted keys in `available` until `kept_back` are left."""
    packs = []
    position_mask = (1 << _POSITION_BITS) - 1
    tokens_left = sum(key >> _POSITION_BITS for key in available)
    while len(available) > kept_back:
        members = []
        room, images_left = packing.max_tokens, packing.max_images
        place = len(available) - 1
        while place >= 0 and images[available[place] & position_mask] <= images_left:
            key = available.pop(place)
            length, position = key >> _POSITION_BITS, key & position_mask
            members.append(position)
            room -= length
            images_left -= images[position]
            tokens_left -= length
            place = bisect_right(available, (room << _POSITION_BITS) | position_mask) - 1
            if place >= 0 and (more := round(room * len(available) / tokens_left)) > 1:
                even = bisect_right(available, (room // more << _POSITION_BITS) | position_mask)
                place = min(place, even)
        packs.append(members)
    return packs
