"""A teacher's predictions on disk, read by record: the folder, its manifest, and the index over its shards.

Shape legend: R records of the data, M places with a stored prediction, I images, N tokens of an image, E
width of the teacher.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from llava_kd.batch import TeacherRows
from llava_kd.checksums import checksum, meta_checksum, sealed
from llava_kd.data.teacher_store.shards import (
    IMAGE_TENSORS,
    DamagedShardError,
    Shard,
    StoredRecord,
    places_to_store,
    text_crc,
)
from llava_kd.data.text.encoder import Encoded
from llava_kd.durable import replacing, write_text
from llava_kd.tensor_files import write_tensors

FORMAT_VERSION = 4  # 1 had no checksums, 2 no standard deviations, 3 no dependency on pictures
MANIFEST = "manifest.json"
INDEX = "index.safetensors"
SHARDS = "shards"
_OPEN_SHARDS = 64
_AGAIN = "the same `llava-kd cache-teacher` command writes what is damaged or missing again"

Mode = Literal["hidden", "topk"]


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What is kept of each record: at which `places` (`response`, `visual`), and in which form.

    `hidden` keeps final hidden states, and the projector's output where `projected`; `topk` the `k` largest
    of the first `columns` logits, and what the others sum to at `temperature`; at `std` also their standard
    deviation. `dependency`: how it was found how much the teacher needs the picture at each response token,
    in words; None where that was not asked.
    """

    mode: Mode
    places: tuple[str, ...]
    projected: bool = False
    k: int | None = None
    columns: int | None = None
    temperature: float | Literal["std"] | None = None
    dependency: str | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """`identity`: what the predictions depend on, by name.

    Once complete: `shards`, the bytes of each file, and `checksums`, of the files beside them.
    """

    identity: Mapping[str, str]
    contents: Contents
    num_records: int
    is_complete: bool = False
    num_bad: int = 0
    shards: Mapping[str, int] = field(default_factory=dict)
    checksums: Mapping[str, int] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Equal for caches that hold the same predictions."""
        contents = asdict(self.contents)
        if self.contents.dependency is None:
            del contents["dependency"]  # so that caches of older versions keep their digest
        text = json.dumps([dict(self.identity), contents, self.num_records], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def write(self, directory: Path) -> None:
        """Replace the manifest of `directory` in one move."""
        tree = sealed({"format": FORMAT_VERSION, **asdict(self)})
        write_text(directory / MANIFEST, json.dumps(tree, indent=2) + "\n")

    @staticmethod
    def read(directory: Path) -> Manifest:
        """Raises ValueError if there is none, or this version cannot read it."""
        path = directory / MANIFEST
        if not path.is_file():
            raise ValueError(
                f"{directory} holds no teacher cache; write one with `llava-kd cache-teacher CONFIG --out "
                f"{directory}`, or set teacher.cache to null"
            )
        try:
            tree = json.loads(path.read_bytes())
            version, seal = tree["format"], tree.get("checksum")
            if version > FORMAT_VERSION:
                raise ValueError(
                    f"{path} has format {version}, this version reads up to {FORMAT_VERSION}; upgrade "
                    "llava_kd"
                )
            if (version > 1 or seal is not None) and seal != meta_checksum(tree):
                raise KeyError("it has another checksum than when it was written")
            fields = {name: value for name, value in tree.items() if name not in ("format", "checksum")}
            contents = Contents(**{**fields["contents"], "places": tuple(fields["contents"]["places"])})
            return Manifest(**{**fields, "contents": contents})
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is not a readable manifest ({error}); write the cache into a new directory with "
                "`llava-kd cache-teacher CONFIG --out NEW` and set teacher.cache to it, or restore the file "
                "from a copy; nothing here needs to be removed"
            ) from error

    def check(self, directory: Path, name: str) -> None:
        """ValueError where that file is no longer what was written; one of an old version is trusted."""
        if name not in self.checksums:
            return
        path = directory / name
        found = checksum(path) if path.is_file() else None
        if found != self.checksums[name]:
            raise ValueError(
                f"{path} {'is gone' if found is None else 'has another checksum than when it was written'}; "
                f"{_AGAIN}"
            )


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A record in a row of a micro-batch; of one that is not valid nothing is read."""

    number: int
    id: str
    encoded: Encoded
    num_images: int
    is_valid: bool


class TeacherCache:
    """Stored predictions by record number; opened by each process for itself, and picklable."""

    def __init__(self, directory: str | Path, places: Sequence[str]) -> None:
        """`places`: what the losses read, `response`, `visual` or both.

        Raises ValueError if the cache is absent, unfinished, or has lost a file.
        """
        self.directory = Path(directory)
        self.manifest = manifest = Manifest.read(self.directory)
        self._places = tuple(places)
        self._names = sorted(manifest.shards)
        self._open: OrderedDict[str, Shard] = OrderedDict()
        self._index: dict[str, Tensor] = {}
        if not manifest.is_complete:
            raise ValueError(
                f"the teacher cache {self.directory} is not complete; run the same `llava-kd "
                "cache-teacher` command again to continue it"
            )
        for name, size in manifest.shards.items():
            path = self.directory / SHARDS / name
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                has = "is gone" if found is None else f"has {found} bytes, not {size}"
                raise ValueError(f"{path} {has}; {_AGAIN}")
        manifest.check(self.directory, INDEX)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": OrderedDict(), "_index": {}}  # files stay in their process

    def rows(self, rows: Sequence[Sequence[Wanted]]) -> TeacherRows:
        """The predictions of a micro-batch whose rows hold these records, as `collate` lays them out.

        Raises ValueError, naming the record, if one is not stored, reads otherwise now, or is damaged.
        """
        length = max(sum(len(wanted.encoded.ids) for wanted in row) for row in rows)
        empty = self._shard(0).empty()
        places = [empty.positions_M.long()]
        tensors = {name: [tensor] for name, tensor in empty.tensors.items()}
        for b, row in enumerate(rows):
            start = b * length
            for wanted in row:
                found = self._find(wanted) if wanted.is_valid else _nothing(empty, wanted.num_images)
                places.append(start + found.positions_M.long())
                for name, parts in tensors.items():
                    parts.append(found.tensors[name])
                start += len(wanted.encoded.ids)
        stored = {name: torch.cat(parts) for name, parts in tensors.items()}
        return TeacherRows(places_M=torch.cat(places), **stored)

    def _find(self, wanted: Wanted) -> StoredRecord:
        index = self._loaded_index()
        where = {name: int(values_R[wanted.number]) for name, values_R in index.items()}
        if where["shard_R"] < 0:
            raise ValueError(
                f"record {wanted.id!r} is not in the teacher cache {self.directory}: it was bad when the "
                f"cache was written; {_AGAIN}"
            )
        if where["text_crc_R"] != text_crc(wanted.id, wanted.encoded):
            raise ValueError(
                f"record {wanted.id!r} now has other tokens than the teacher read for {self.directory}; use "
                "the teacher's tokenizer for the student, or run with teacher.cache null"
            )
        try:
            record = self._shard(where["shard_R"]).read(where)
        except DamagedShardError as error:
            raise ValueError(f"{error}; {_AGAIN}") from error
        if record.crc() != where["crc_R"]:
            path = self.directory / SHARDS / self._names[where["shard_R"]]
            raise ValueError(f"{path} is damaged: record {wanted.id!r} changed; {_AGAIN}")
        return self._at(record, wanted)

    def _at(self, record: StoredRecord, wanted: Wanted) -> StoredRecord:
        """The rows that this run reads, which may be fewer than those stored."""
        asked_M = places_to_store(wanted.encoded, self._places)
        if torch.equal(asked_M, record.positions_M):
            return record
        at_M = torch.searchsorted(record.positions_M, asked_M).clamp_max(max(0, len(record.positions_M) - 1))
        held_M = record.positions_M[at_M] == asked_M if len(record.positions_M) else asked_M < 0
        if not bool((held_M | _stands_in(wanted.encoded, asked_M)).all()):
            raise ValueError(
                f"record {wanted.id!r} needs token positions that {self.directory} does not store; {_AGAIN}"
            )
        chosen = {
            name: tensor if name in IMAGE_TENSORS else _where(held_M, tensor, at_M)
            for name, tensor in record.tensors.items()
        }
        return StoredRecord(
            number=record.number, text_crc=record.text_crc, positions_M=asked_M, tensors=chosen
        )

    def _shard(self, s: int) -> Shard:
        name = self._names[s]
        if (shard := self._open.get(name)) is None:
            try:
                shard = self._open[name] = Shard(self.directory / SHARDS / name)
            except DamagedShardError as error:
                raise ValueError(f"{error}; {_AGAIN}") from error
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(name)
        return shard

    def _loaded_index(self) -> dict[str, Tensor]:
        if not self._index:
            path = self.directory / INDEX
            try:
                self._index = load_file(path)
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} cannot be read ({error}); {_AGAIN}") from error
        return self._index


def _stands_in(encoded: Encoded, places_M: Tensor) -> Tensor:
    """Whether each place is before a token of the prompt that stands beside one that only the student has.

    No term reads the teacher there (see `alignment.matched`).
    """
    if not len(encoded.spans):
        return torch.zeros(len(places_M), dtype=torch.bool)
    next_M = (places_M.long() + 1).clamp_max(len(encoded.ids) - 1)
    return ~encoded.spans[next_M].any(1) & ~encoded.visual[places_M.long()]


def _where(held_M: Tensor, tensor: Tensor, at_M: Tensor) -> Tensor:
    """Rows of what is held; zeros elsewhere."""
    if not len(tensor):
        return tensor.new_zeros(len(at_M), *tensor.shape[1:])
    rows = tensor[at_M]
    rows[~held_M] = 0
    return rows


def _nothing(empty: StoredRecord, num_images: int) -> StoredRecord:
    """A record without a row, whose images are zeros."""
    tensors = {
        name: tensor.new_zeros(num_images, *tensor.shape[1:]) if name in IMAGE_TENSORS else tensor
        for name, tensor in empty.tensors.items()
    }
    return StoredRecord(number=-1, text_crc=0, positions_M=empty.positions_M, tensors=tensors)


def write_index(directory: Path, shards: Iterable[Shard], num_records: int) -> int:
    """Write where each record is; the number of those that are nowhere."""
    index: dict[str, Tensor] = {}
    for s, shard in enumerate(sorted(shards, key=lambda shard: shard.path.name)):
        number_R = shard.table["number_R"]
        for name, values_R in {**shard.table, "shard_R": torch.full_like(number_R, s)}.items():
            column = index.setdefault(name, torch.full((num_records,), -1))
            column[number_R] = values_R
    with replacing(directory / INDEX) as scratch:
        write_tensors(index, scratch)
    return int((index["shard_R"] < 0).sum())
