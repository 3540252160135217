"""Files that hold a teacher's predictions, some hundred records each: written whole, read record by record.

A shard is a safetensors file. Its rows are those of its records one after the other; `rows_R` and `images_R`
say how many of them, and how many images, each record has.

Shape legend: R records of a shard, M places with a stored prediction, I images, N tokens of an image, E width
of the teacher, K stored columns.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llava_kd.batch import IGNORE_INDEX
from llava_kd.data.text.encoder import Encoded
from llava_kd.durable import replacing
from llava_kd.tensor_files import write_tensors

SUFFIX = ".safetensors"
ROW_TENSORS = ("hidden_ME", "top_logits_MK", "top_columns_MK", "rest_M", "std_M", "dependency_M")
IMAGE_TENSORS = ("projected_INE",)
_TABLE = ("number_R", "rows_R", "images_R", "crc_R", "text_crc_R")
_TABLE_CRC = "table_crc"  # shards of older versions have none, and are trusted
_KNOWN = {*ROW_TENSORS, *IMAGE_TENSORS, *_TABLE, _TABLE_CRC, "positions_M"}


class DamagedShardError(Exception):
    """A shard cannot be read, or does not hold what was written."""


@dataclass(frozen=True, kw_only=True)
class StoredRecord:
    """One record: its number in the data, the hash of its tokens, and what is kept of the teacher.

    `positions_M` count from the record's first token. `tensors` are named as in `TeacherRows`.
    """

    number: int
    text_crc: int
    positions_M: Tensor
    tensors: Mapping[str, Tensor]

    @property
    def num_bytes(self) -> int:
        return self.positions_M.nbytes + sum(tensor.nbytes for tensor in self.tensors.values())

    def crc(self) -> int:
        """Checksum of the stored bytes."""
        value = zlib.crc32(_bytes(self.positions_M))
        for name in sorted(self.tensors):
            value = zlib.crc32(_bytes(self.tensors[name]), value)
        return value


def text_crc(record_id: str, encoded: Encoded) -> int:
    """Checksum of a record's name and tokens; which token stands for an image does not matter."""
    ids = encoded.ids.masked_fill(encoded.visual, -1).to(torch.int32)
    return zlib.crc32(_bytes(ids), zlib.crc32(record_id.encode("utf-8", "surrogatepass")))


def places_to_store(encoded: Encoded, places: Sequence[str]) -> Tensor:
    """Positions of a record at which losses read the teacher: before each target, at each visual token."""
    mask = torch.zeros_like(encoded.visual)
    if "response" in places:
        mask[:-1] |= encoded.labels[1:] != IGNORE_INDEX
    if "visual" in places:
        mask |= encoded.visual
    return mask.nonzero().squeeze(1).to(torch.int32)


def write_shard(directory: Path, records: Sequence[StoredRecord]) -> Path:
    """Write a new file, named after its first record: complete and on disk, or not there.

    Raises ValueError if it cannot be written, as on a full disk.
    """
    path = directory / f"{records[0].number:09d}{SUFFIX}"
    tensors = {
        "number_R": torch.tensor([record.number for record in records]),
        "rows_R": torch.tensor([len(record.positions_M) for record in records]),
        "images_R": torch.tensor([_num_images(record) for record in records]),
        "crc_R": torch.tensor([record.crc() for record in records]),
        "text_crc_R": torch.tensor([record.text_crc for record in records]),
        "positions_M": torch.cat([record.positions_M for record in records]),
    }
    tensors[_TABLE_CRC] = torch.tensor([_table_crc(tensors)])
    for name in records[0].tensors:
        tensors[name] = torch.cat([record.tensors[name] for record in records])
    try:
        with replacing(path) as scratch:
            write_tensors(tensors, scratch)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written: {error}; the shards before it are whole. Free some space; the same "
            "command then goes on"
        ) from error
    return path


@dataclass
class Shard:
    """An open shard: its table is in memory, its rows stay mapped. DamagedShardError if it cannot be."""

    path: Path
    table: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        try:
            self._file = safe_open(self.path, framework="pt")
            self._names = set(self._file.keys())
            self.table = {name: self._file.get_tensor(name) for name in _TABLE}
        except (SafetensorError, OSError) as error:
            raise DamagedShardError(f"{self.path} cannot be read ({error})") from error
        if unknown := sorted(self._names - _KNOWN):
            raise DamagedShardError(f"{self.path} is damaged: it holds {unknown}")
        seal = self._file.get_tensor(_TABLE_CRC).tolist() if _TABLE_CRC in self._names else None
        if seal not in (None, [_table_crc(self.table)]):
            raise DamagedShardError(f"{self.path} is damaged: its table changed")
        self.table["row_R"] = self.table["rows_R"].cumsum(0) - self.table["rows_R"]
        self.table["image_R"] = self.table["images_R"].cumsum(0) - self.table["images_R"]

    def __len__(self) -> int:
        return len(self.table["number_R"])

    def record(self, r: int) -> StoredRecord:
        """What is stored as the shard's record `r`. Raises DamagedShardError if the bytes are other ones."""
        where = {name: int(values_R[r]) for name, values_R in self.table.items()}
        record = self.read(where)
        if record.crc() != where["crc_R"]:
            raise DamagedShardError(f"{self.path} is damaged: record number {where['number_R']} changed")
        return record

    def read(self, where: Mapping[str, int]) -> StoredRecord:
        """The rows that a line of the table names."""
        rows = slice(where["row_R"], where["row_R"] + where["rows_R"])
        images = slice(where["image_R"], where["image_R"] + where["images_R"])
        tensors = {name: self._file.get_slice(name)[rows] for name in ROW_TENSORS if name in self._names}
        tensors |= {name: self._file.get_slice(name)[images] for name in IMAGE_TENSORS if name in self._names}
        return StoredRecord(
            number=where["number_R"],
            text_crc=where["text_crc_R"],
            positions_M=self._file.get_slice("positions_M")[rows],
            tensors=tensors,
        )

    def empty(self) -> StoredRecord:
        """A record of no row and no image, with the shard's sizes and types."""
        rows = {"row_R": 0, "rows_R": 0, "image_R": 0, "images_R": 0}
        return self.read({**rows, "number_R": -1, "text_crc_R": 0})

    def check(self) -> None:
        """Read every record. Raises DamagedShardError at the first that changed."""
        for r in range(len(self)):
            self.record(r)


def _table_crc(tensors: Mapping[str, Tensor]) -> int:
    value = 0
    for name in _TABLE:
        value = zlib.crc32(_bytes(tensors[name]), value)
    return value


def _num_images(record: StoredRecord) -> int:
    return next((len(record.tensors[name]) for name in IMAGE_TENSORS if name in record.tensors), 0)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
