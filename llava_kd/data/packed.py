"""Records as one block of bytes and their offsets, in memory or mapped: nothing to copy per worker."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from llava_kd.data.conversation import Record, Turn

_BYTES = "records.bin"
_OFFSETS = "offsets.npy"


class PackedRecords:
    """Record by number. One that is mapped from a folder is pickled as its path."""

    def __init__(self, block: np.ndarray, offsets: np.ndarray, folder: Path | None = None) -> None:
        self._block = block
        self._offsets = offsets
        self._folder = folder
        self._last: tuple[int, Record] | None = None  # a record is asked for again with each of its images

    @classmethod
    def pack(cls, records: Iterable[Record]) -> PackedRecords:
        lines = [_dump(record) for record in records]
        offsets = np.cumsum([0, *(len(line) for line in lines)], dtype=np.int64)
        return cls(np.frombuffer(b"".join(lines), np.uint8), offsets)

    @classmethod
    def open(cls, folder: Path) -> PackedRecords:
        """Map what `save` wrote."""
        offsets = np.load(folder / _OFFSETS, mmap_mode="r")
        return cls(np.memmap(folder / _BYTES, np.uint8, mode="r"), offsets, folder)

    def save(self, folder: Path) -> None:
        self._block.tofile(folder / _BYTES)
        np.save(folder / _OFFSETS, self._offsets)

    def digest(self) -> bytes:
        """Hash of every record."""
        return hashlib.sha256(self._block.data).digest()

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, i: int) -> Record:
        if self._last is not None and self._last[0] == i:
            return self._last[1]
        start, stop = self._offsets[i], self._offsets[i + 1]
        raw = json.loads(self._block[start:stop].tobytes())
        turns = tuple(Turn(role, text) for role, text in raw["turns"])
        record = Record(id=raw["id"], images=tuple(raw["images"]), turns=turns, extra=raw["extra"])
        self._last = (i, record)
        return record

    def __reduce__(self) -> tuple:
        if self._folder is not None:
            return PackedRecords.open, (self._folder,)
        return PackedRecords, (self._block, self._offsets)


def _dump(record: Record) -> bytes:
    turns = [(turn.role, turn.text) for turn in record.turns]
    raw = {"id": record.id, "images": record.images, "turns": turns, "extra": dict(record.extra)}
    return json.dumps(raw, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
