"""Records as one block of bytes and their offsets, in memory or mapped: nothing to copy per worker."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from llava_kd.data.sources.conversation import Record, Turn

_BYTES = "records.bin"
_OFFSETS = "offsets.npy"
_FAULTS = "faults.npy"


class PackedRecords:
    """Record by number. One that is mapped from a folder is pickled as its path.

    `faults` are the numbers of those that cannot be used.
    """

    def __init__(
        self, block: np.ndarray, offsets: np.ndarray, faults: tuple[int, ...], folder: Path | None = None
    ) -> None:
        self.faults = faults
        self._block = block
        self._offsets = offsets
        self._folder = folder
        self._last: tuple[int, Record] | None = None  # a record is asked for again with each of its images

    @classmethod
    def pack(cls, records: Iterable[Record]) -> PackedRecords:
        lines, faults = [], []
        for number, record in enumerate(records):
            lines.append(_dump(record))
            if record.fault:
                faults.append(number)
        offsets = np.cumsum([0, *(len(line) for line in lines)], dtype=np.int64)
        return cls(np.frombuffer(b"".join(lines), np.uint8), offsets, tuple(faults))

    @classmethod
    def open(cls, folder: Path) -> PackedRecords:
        """Map what `save` wrote."""
        offsets = np.load(folder / _OFFSETS, mmap_mode="r")
        faults = np.load(folder / _FAULTS).tolist() if (folder / _FAULTS).is_file() else ()
        return cls(np.memmap(folder / _BYTES, np.uint8, mode="r"), offsets, tuple(faults), folder)

    def save(self, folder: Path) -> None:
        self._block.tofile(folder / _BYTES)
        np.save(folder / _OFFSETS, self._offsets)
        if self.faults:
            np.save(folder / _FAULTS, np.array(self.faults))

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
        record = Record(**{**raw, "images": tuple(raw["images"]), "turns": turns})
        self._last = (i, record)
        return record

    def __reduce__(self) -> tuple:
        if self._folder is not None:
            return PackedRecords.open, (self._folder,)
        return PackedRecords, (self._block, self._offsets, self.faults)


def _dump(record: Record) -> bytes:
    turns = [(turn.role, turn.text) for turn in record.turns]
    raw = {"id": record.id, "images": record.images, "turns": turns, "extra": dict(record.extra)}
    raw |= {name: text for name in ("fault", "note") if (text := getattr(record, name))}
    return json.dumps(raw, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
