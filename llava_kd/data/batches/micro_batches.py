"""Micro-batches by step and number: what a data worker makes, without a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import Dataset

from llava_kd.batch import IGNORE_INDEX, TeacherRows
from llava_kd.data.batches.bad_records import BadRecord
from llava_kd.data.batches.collate import CollatedRows, Item, RawImages, collate, collate_foreign, masked
from llava_kd.data.batches.listed_plan import Listing
from llava_kd.data.batches.model_side import AnySide, Side
from llava_kd.data.batches.order import Order, Reading
from llava_kd.data.batches.plan import Plan
from llava_kd.data.foreign.own_inputs import OwnInputs
from llava_kd.data.foreign.reader import Reader
from llava_kd.data.foreign.side import ForeignSide
from llava_kd.data.pixels.device_decode import plain_jpeg_size
from llava_kd.data.pixels.images import GREY, check_size, decode, orientation
from llava_kd.data.pixels.orientation import AS_STORED
from llava_kd.data.sources.conversation import Record, Source
from llava_kd.data.sources.pictures.image_paths import named
from llava_kd.data.teacher_store.store import TeacherCache, Wanted
from llava_kd.data.text.alignment import matched
from llava_kd.data.text.encoder import Encoded
from llava_kd.data.text.private import Tagger
from llava_kd.data.text.stretches import stretched

_CACHED_TOKENS = 4_000_000
_GREY_SIDE = 64  # of a stand-in that every processor can read


@dataclass(frozen=True, kw_only=True)
class Micro:
    """What a worker hands over: `rows` of the student and, where it reads differently, of the teacher.

    `step` is the optimiser step that it is of. `sources` names where each record comes from.
    """

    step: int
    rows: tuple[CollatedRows, ...]
    raw: RawImages | None
    record_ids: tuple[str, ...]
    sources: tuple[str, ...]
    bad: tuple[BadRecord, ...]
    num_images: int
    num_truncated: int
    teacher_rows: TeacherRows | None = None

    def pinned(self) -> Micro:
        """The same in page-locked memory."""
        raw = None if self.raw is None else self.raw.pinned()
        stored = None if self.teacher_rows is None else self.teacher_rows.map(Tensor.pin_memory)
        rows = tuple(rows.pinned() for rows in self.rows)
        return replace(self, rows=rows, raw=raw, teacher_rows=stored)


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    """A record as each side reads it, and its decoded images if they are left raw."""

    id: str
    items: tuple[Item, ...]
    raw: tuple[Tensor, ...]


class MicroBatches(Dataset[Micro]):
    """Micro-batch by (step, number within the step); all that a worker needs, and picklable.

    `leaves_raw` hands images over as they are, for a device to resize; the decoder nvjpeg leaves those JPEGs
    encoded that the device may decode.
    """

    def __init__(
        self,
        *,
        source: Source,
        sides: tuple[AnySide, ...],
        plan: Plan | Listing,
        order: Order,
        reading: Reading,
        leaves_raw: bool = False,
        teacher_cache: TeacherCache | None = None,
        tagger: Tagger | None = None,
    ) -> None:
        self._source = source
        self._sides = sides
        self._own_sides = [side for side in sides if isinstance(side, Side)]
        self._encoders = [side.encoder() for side in self._own_sides]
        self._foreign = next((side for side in sides if isinstance(side, ForeignSide)), None)
        self._reader: Reader | None = None  # made by the thread or process that reads
        self._plan = plan
        self._micro_batch_size = order.micro_batch_size
        self._rank = order.rank
        self._max_pixels = reading.max_pixels
        (self._upright,) = {side.upright for side in sides}
        self._leaves_raw = leaves_raw
        self._leaves_encoded = leaves_raw and reading.decoder == "nvjpeg"
        self._one_record_per_row = order.one_record_per_row
        self._encoded: dict[int, tuple[Encoded, ...] | str] = {}
        self._cached_tokens = 0
        self._loaded: dict[int, _Loaded] = {}
        self._image_cache_bytes = reading.image_cache_bytes
        self._teacher_cache = teacher_cache
        self._tagger = tagger
        self._spellers = reading.spellers

    def __getitem__(self, key: tuple[int, int]) -> Micro:
        step, number = key
        first = number * self._micro_batch_size
        rows = self._plan.rows(step, self._rank)[first : first + self._micro_batch_size]
        if self._one_record_per_row:
            rows = [(i,) for row in rows for i in row]
        bad: list[BadRecord] = []
        loaded = [[self._load(i, bad) for i in row] for row in rows]
        flat = [one for row in loaded for one in row]
        return Micro(
            step=step,
            rows=tuple(
                _rows(side, [[one.items[s] for one in row] for row in loaded])
                for s, side in enumerate(self._sides)
            ),
            raw=RawImages.of([image for one in flat for image in one.raw]) if self._leaves_raw else None,
            record_ids=tuple(one.id for one in flat),
            sources=tuple(self._source.name_of(i) for row in rows for i in row),
            bad=tuple(bad),
            num_images=sum(one.items[0].num_images for one in flat),
            num_truncated=sum(one.items[0].encoded.is_truncated for one in flat),
            teacher_rows=self._teacher_rows(rows, loaded),
        )

    def _teacher_rows(
        self, rows: Sequence[Sequence[int]], loaded: Sequence[Sequence[_Loaded]]
    ) -> TeacherRows | None:
        if self._teacher_cache is None:
            return None
        wanted = [
            [_wanted(i, one) for i, one in zip(row, ones, strict=True)]
            for row, ones in zip(rows, loaded, strict=True)
        ]
        if self._foreign is not None:
            wanted = [[one] for row in wanted for one in row]
        return self._teacher_cache.rows(wanted)

    def _load(self, i: int, bad: list[BadRecord]) -> _Loaded:
        """The record, ready, and kept while there is room; a bad one is masked and added to `bad`."""
        if (kept := self._loaded.get(i)) is not None:
            return kept
        record = self._source.record(i)
        encoded = self._encode(i, record)
        if isinstance(encoded, str):
            return self._unusable(i, record, encoded, bad)
        images, reasons = self._decoded(i, record)
        items = tuple(
            Item(
                encoded=e,
                images=() if self._leaves_raw else tuple(side.transform.resize(image) for image in images),
                num_images=len(images),
                is_valid=True,
            )
            for e, side in zip(encoded, self._own_sides, strict=True)
        )
        if self._foreign is not None:
            try:
                items = self._with_foreign(record, images, items, self._foreign)
            except ValueError as error:
                return self._unusable(i, record, str(error), bad)
        if reasons:
            bad.append(BadRecord(id=record.id, source=self._source.name_of(i), reason="; ".join(reasons)))
            items = tuple(masked(item) for item in items)
        loaded = _Loaded(id=record.id, items=items, raw=tuple(images) if self._leaves_raw else ())
        if not reasons:
            self._keep(i, loaded)
        return loaded

    def _unusable(self, i: int, record: Record, reason: str, bad: list[BadRecord]) -> _Loaded:
        bad.append(BadRecord(id=record.id, source=self._source.name_of(i), reason=reason))
        return _Loaded(id=record.id, items=tuple(_stand_in(side) for side in self._sides), raw=())

    def _with_foreign(
        self, record: Record, images: Sequence[Tensor], items: tuple[Item, ...], side: ForeignSide
    ) -> tuple[Item, ...]:
        """The record as the teacher's own processor reads it too, answers in step with the student's."""
        if self._reader is None:
            self._reader = side.reader()
        read = self._reader(record, images)
        theirs = read.encoded if self._tagger is None else self._tagger(record, read.encoded)
        encoded = matched(record, (*(item.encoded for item in items), theirs))
        own = read.own if side.keeps_pictures else OwnInputs()
        foreign = Item(encoded=theirs, images=(), num_images=len(images), is_valid=True, own=own)
        return tuple(replace(item, encoded=e) for item, e in zip((*items, foreign), encoded, strict=True))

    def _keep(self, i: int, loaded: _Loaded) -> None:
        pixels = [*loaded.raw, *(image for item in loaded.items for image in item.images)]
        size = sum(image.nbytes for image in pixels)
        size += sum(item.own.nbytes for item in loaded.items if item.own is not None)
        if size <= self._image_cache_bytes:
            self._loaded[i] = loaded
            self._image_cache_bytes -= size

    def _decoded(self, i: int, record: Record) -> tuple[list[Tensor], list[str]]:
        """Each image, a grey one in the place of a bad one, and what is wrong with those."""
        images, reasons = [], []
        for k, name in enumerate(record.images):
            try:
                images.append(self._pixels(self._source.image_bytes(i, k)))
            except (ValueError, OSError) as error:
                reasons.append(named(error, name))
                side = 1 if self._foreign is None else _GREY_SIDE
                images.append(torch.full((side, side, 3), GREY, dtype=torch.uint8))
        return images, reasons

    def _pixels(self, data: bytes) -> Tensor:
        """Decoded, or the bytes themselves where a device decodes them, which turns no picture."""
        if self._leaves_encoded and (size := plain_jpeg_size(data)) is not None:
            check_size(size[1], size[0], self._max_pixels)
            if not self._upright or orientation(data, max_pixels=self._max_pixels) == AS_STORED:
                return torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return decode(data, max_pixels=self._max_pixels, upright=self._upright)

    def _encode(self, i: int, record: Record) -> tuple[Encoded, ...] | str:
        """The record's tokens on each side, or why it has none; kept in memory while there is room."""
        cached = self._encoded.get(i)
        if cached is not None:
            return cached
        try:
            result = self._in_step(record, tuple(encoder(record) for encoder in self._encoders))
            if self._tagger is not None:
                result = tuple(self._tagger(record, encoded) for encoded in result)
        except ValueError as error:
            result = str(error)
        size = 1 if isinstance(result, str) else sum(len(encoded.ids) for encoded in result)
        if self._cached_tokens + size <= _CACHED_TOKENS:
            self._encoded[i] = result
            self._cached_tokens += size
        return result

    def _in_step(self, record: Record, encoded: tuple[Encoded, ...]) -> tuple[Encoded, ...]:
        if self._spellers is None or len(encoded) < 2:
            return matched(record, encoded)
        return stretched(record, (encoded[0], encoded[1]), self._spellers)


def _wanted(number: int, loaded: _Loaded) -> Wanted:
    """What a cache is asked for: the record as the teacher reads it."""
    item = loaded.items[-1]
    return Wanted(
        number=number,
        id=loaded.id,
        encoded=item.encoded,
        num_images=item.num_images,
        is_valid=item.is_valid,
    )


def _rows(side: AnySide, rows: Sequence[Sequence[Item]]) -> CollatedRows:
    if isinstance(side, ForeignSide):
        return collate_foreign([item for row in rows for item in row], pad_id=side.pad_id)
    return collate(rows, pad_id=side.pad_id, size=side.transform.size)


def _stand_in(side: AnySide) -> Item:
    """One padding token: the place of a record that has no encoding."""
    encoded = Encoded(
        ids=torch.tensor([side.pad_id]),
        labels=torch.tensor([IGNORE_INDEX]),
        visual=torch.tensor([False]),
        spans=torch.zeros(1, 4, dtype=torch.int32),
    )
    return Item(encoded=encoded, images=(), num_images=0, is_valid=False)
