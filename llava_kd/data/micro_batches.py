"""Micro-batches by step and number: what a data worker makes, without a device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.utils.data import Dataset

from llava_kd.batch import IGNORE_INDEX
from llava_kd.data.bad_records import BadRecord
from llava_kd.data.collate import Item, Rows, collate, masked
from llava_kd.data.conversation import Record, Source
from llava_kd.data.images import GREY, decode
from llava_kd.data.plan import Plan
from llava_kd.data.side import Side
from llava_kd.data.template import Encoded

_CACHED_TOKENS = 4_000_000


@dataclass(frozen=True, kw_only=True)
class Micro:
    """What a worker hands over for one micro-batch."""

    student: Rows
    teacher: Rows | None
    record_ids: tuple[str, ...]
    bad: tuple[BadRecord, ...]
    num_truncated: int


class MicroBatches(Dataset[Micro]):
    """Micro-batch by (step, number within the step); all that a worker needs, and picklable."""

    def __init__(
        self,
        *,
        source: Source,
        sides: tuple[Side, ...],
        plan: Plan,
        micro_batch_size: int,
        rank: int,
        max_pixels: int,
        one_record_per_row: bool = False,
    ) -> None:
        self._source = source
        self._sides = sides
        self._encoders = [side.encoder() for side in sides]
        self._plan = plan
        self._micro_batch_size = micro_batch_size
        self._rank = rank
        self._max_pixels = max_pixels
        self._one_record_per_row = one_record_per_row
        self._encoded: dict[int, tuple[Encoded, ...] | str] = {}
        self._cached_tokens = 0

    def __getitem__(self, key: tuple[int, int]) -> Micro:
        step, number = key
        first = number * self._micro_batch_size
        rows = self._plan.rows(step, self._rank)[first : first + self._micro_batch_size]
        if self._one_record_per_row:
            rows = [(i,) for row in rows for i in row]
        bad: list[BadRecord] = []
        items = [[self._items(i, bad) for i in row] for row in rows]
        sides = [
            collate(
                [[item[s] for item in row] for row in items], pad_id=side.pad_id, size=side.transform.size
            )
            for s, side in enumerate(self._sides)
        ]
        return Micro(
            student=sides[0],
            teacher=sides[1] if len(sides) > 1 else None,
            record_ids=tuple(self._source.record(i).id for row in rows for i in row),
            bad=tuple(bad),
            num_truncated=sum(item[0].encoded.is_truncated for row in items for item in row),
        )

    def _items(self, i: int, bad: list[BadRecord]) -> tuple[Item, ...]:
        """The record as each side reads it; a bad one is masked and added to `bad`."""
        record = self._source.record(i)
        encoded = self._encode(i, record)
        if isinstance(encoded, str):
            bad.append(BadRecord(id=record.id, source=self._source.name_of(i), reason=encoded))
            return tuple(_stand_in(side) for side in self._sides)
        images: list[list[torch.Tensor]] = [[] for _ in self._sides]
        reasons = []
        for k in range(len(record.images)):
            try:
                pixels_HWC = decode(self._source.image_bytes(i, k), max_pixels=self._max_pixels)
            except (ValueError, OSError) as error:
                reasons.append(f"image {record.images[k]!r}: {error}")
                pixels_HWC = None
            for s, side in enumerate(self._sides):
                images[s].append(
                    torch.full((*side.transform.size, 3), GREY, dtype=torch.uint8)
                    if pixels_HWC is None
                    else side.transform.resize(pixels_HWC)
                )
        items = tuple(
            Item(encoded=e, images=tuple(pixels), is_valid=True)
            for e, pixels in zip(encoded, images, strict=True)
        )
        if reasons:
            bad.append(BadRecord(id=record.id, source=self._source.name_of(i), reason="; ".join(reasons)))
            return tuple(masked(item) for item in items)
        return items

    def _encode(self, i: int, record: Record) -> tuple[Encoded, ...] | str:
        """The record's tokens on each side, or why it has none; kept in memory while there is room."""
        cached = self._encoded.get(i)
        if cached is not None:
            return cached
        try:
            result = matched(record, tuple(encoder(record) for encoder in self._encoders))
        except ValueError as error:
            result = str(error)
        size = 1 if isinstance(result, str) else sum(len(encoded.ids) for encoded in result)
        if self._cached_tokens + size <= _CACHED_TOKENS:
            self._encoded[i] = result
            self._cached_tokens += size
        return result


def matched(record: Record, encoded: tuple[Encoded, ...]) -> tuple[Encoded, ...]:
    """The two sides with the same targets: the longer loses those that truncation took from the shorter.

    ValueError if the answers are not the same tokens on both sides.
    """
    if len(encoded) < 2:
        return encoded
    targets = [e.labels[e.labels != IGNORE_INDEX] for e in encoded]
    shared = min(len(t) for t in targets)
    if not torch.equal(targets[0][:shared], targets[1][:shared]):
        raise ValueError(
            f"record {record.id!r}: student and teacher must read the same answer tokens; give both "
            "sides the same template"
        )
    return tuple(_first_targets(e, shared) for e in encoded)


def _first_targets(encoded: Encoded, count: int) -> Encoded:
    is_target = encoded.labels != IGNORE_INDEX
    late = is_target & (is_target.cumsum(0) > count)
    if not bool(late.any()):
        return encoded
    return replace(encoded, labels=encoded.labels.masked_fill(late, IGNORE_INDEX), is_truncated=True)


def _stand_in(side: Side) -> Item:
    """One padding token: the place of a record that has no encoding."""
    encoded = Encoded(
        ids=torch.tensor([side.pad_id]),
        labels=torch.tensor([IGNORE_INDEX]),
        visual=torch.tensor([False]),
    )
    return Item(encoded=encoded, images=(), is_valid=False)
