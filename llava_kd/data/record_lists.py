"""Lists of records: which of a source a run reads, by number, without a copy of any.

A list is JSON: {"format": 1, "sources": [{"name", "fingerprint", "num_records", "records"}], "checksum"}, the
records of each source in ascending order. It is known by what it says, so it may lie anywhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llava_kd.checksums import meta_checksum, sealed
from llava_kd.data.sources.conversation import Record
from llava_kd.data.sources.kinds import FileSource
from llava_kd.durable import write_whole

_FORMAT = 1
_MAX_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class RecordList:
    """The records of one source. `name` is for people; `fingerprint` says which source it is."""

    name: str
    fingerprint: str
    num_records: int
    records: tuple[int, ...]

    def __post_init__(self) -> None:
        numbers = np.asarray(self.records, dtype=np.int64)
        if not len(numbers):
            raise ValueError(f"the list keeps no record of {self.name}; leave that source out of the data")
        if numbers[0] < 0 or numbers[-1] >= self.num_records or (np.diff(numbers) <= 0).any():
            raise ValueError(
                f"the records of {self.name} must be whole numbers from 0 to {self.num_records - 1}, each "
                "once and in ascending order; write the list again"
            )


def write_lists(path: Path, lists: Sequence[RecordList], **made: object) -> None:
    """A file for `data.records`, there whole or not at all. `made` says how it came about, for people."""
    sources = [{**vars(one), "records": list(one.records)} for one in lists]
    tree = sealed({"format": _FORMAT, **made, "sources": sources})
    write_whole(path, [json.dumps(tree, separators=(",", ":")).encode() + b"\n"])


def read_lists(path: str | Path) -> tuple[RecordList, ...]:
    """Raises ValueError for what is no list, is damaged, or comes from a newer version."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"no record list {path}; write one with `llava-kd data select`, or set data.records to null"
        )
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; a record list has at most {_MAX_BYTES}")
    try:
        tree = json.loads(path.read_bytes())
        version = tree["format"]
        if not isinstance(version, int) or version > _FORMAT:
            raise ValueError(
                f"it has format {version!r}, this version reads up to {_FORMAT}; upgrade llava_kd"
            )
        if tree["checksum"] != meta_checksum(tree):
            raise ValueError("it has another checksum than when it was written; write it again")
        return tuple(RecordList(**{**one, "records": tuple(one["records"])}) for one in tree["sources"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path} is not a readable record list: {error}") from error


class Chosen:
    """The records of a source that a list names, in its order, under the ids that they had."""

    def __init__(self, source: FileSource, records: Sequence[int]) -> None:
        self._source = source
        self._numbers = np.asarray(records, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._numbers)

    def record(self, i: int) -> Record:
        return self._source.record(int(self._numbers[i]))

    def image_bytes(self, i: int, k: int) -> bytes:
        return self._source.image_bytes(int(self._numbers[i]), k)

    def name_of(self, i: int) -> str:
        return self._source.name_of(int(self._numbers[i]))

    @property
    def faults(self) -> Sequence[int]:
        return np.isin(self._numbers, np.asarray(self._source.faults, dtype=np.int64)).nonzero()[0].tolist()

    @property
    def fingerprint(self) -> str:
        """Of the records of the source, and of which of them are read."""
        digest = hashlib.sha256(self._source.fingerprint.encode())
        digest.update(self._numbers.astype("<i8").tobytes())
        return digest.hexdigest()


def chosen(sources: Mapping[str, FileSource], path: str | Path) -> dict[str, FileSource]:
    """What the list at `path` keeps of each source, by its name.

    Raises ValueError for a source that the list was not written for, and for a list of more than these.
    """
    lists = {one.fingerprint: one for one in read_lists(path)}
    found: dict[str, FileSource] = {}
    for name, source in sources.items():
        own = lists.pop(source.fingerprint, None)
        if own is None or own.num_records != len(source):
            known = ", ".join(one.name for one in read_lists(path))
            raise ValueError(
                f"the record list {path} was written for other data than {name}: it lists {known} as they "
                "were then; restore those files, or select from the present records with `llava-kd data "
                "select`"
            )
        found[name] = Chosen(source, own.records)
    if lists:
        left = ", ".join(one.name for one in lists.values())
        raise ValueError(
            f"the record list {path} also selects from {left}, which `data` does not name; add it to "
            "data.sources, or select again"
        )
    return found
