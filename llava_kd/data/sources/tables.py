"""Parquet and Arrow files with embedded images: the layouts that Hugging Face `datasets` writes.

Columns: `conversations`, a list of {from, value}, or `messages`, of {role, content}; `image` or `images`,
bytes or {bytes, path} or a list of them; `id` if there is one. Arrow files (`save_to_disk`) are mapped and
read at random at no cost. A Parquet file is read by row groups, the last few of which are kept: write it with
small ones (a hundred records).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llava_kd.data.sources.conversation import Broken, Record, entry_with_images, read_records
from llava_kd.data.sources.entries import START, check_not_in_place
from llava_kd.data.sources.packed import PackedRecords

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
else:
    try:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq
    except ImportError:
        pa = pc = pq = None

_GROUPS_KEPT = 4
_ARROW_FILE = b"ARROW1"  # a stream begins otherwise
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
_IMAGE_COLUMNS = ("image", "images")


class Tables:
    """Records of `.parquet` and `.arrow` files. Needs the package pyarrow."""

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self._paths = tuple(Path(path) for path in paths)
        if not self._paths:
            raise ValueError("no tables were given")
        if missing := [str(path) for path in self._paths if not path.is_file()]:
            raise ValueError(f"no table {', '.join(missing)}")
        entries: list[dict | Broken] = []
        places = []
        for number, path in enumerate(self._paths):
            table = _opened(path)
            for group in range(table.num_groups):
                with _naming(path):
                    rows = table.text_rows(group)
                for row, (raw, num_images) in enumerate(rows):
                    names = [f"{path.name}#{len(entries)}:{k}" for k in range(num_images)]
                    is_broken = isinstance(raw, Broken)
                    entries.append(raw if is_broken else entry_with_images(raw, str(len(entries)), names))
                    places.append((number, group, row))
        records = read_records(entries, ", ".join(path.name for path in self._paths))
        self._records = PackedRecords.pack(records)
        self._places = np.array(places, dtype=np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self._records)

    def record(self, i: int) -> Record:
        return self._records[i]

    def image_bytes(self, i: int, k: int) -> bytes:
        number, group, row = self._places[i].tolist()
        with _naming(self._paths[number]):
            value = _images(self._paths[number], group)[row].as_py()
        value = value[k] if isinstance(value, list) else value
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise ValueError(
                f"the table holds no bytes of image {k}, only {str(value)[:80]!r}; write the images into it"
            )
        return data

    def name_of(self, i: int) -> str:
        return self._paths[int(self._places[i, 0])].name

    @property
    def faults(self) -> Sequence[int]:
        """Numbers of the records that cannot be used."""
        return self._records.faults

    @property
    def fingerprint(self) -> str:
        """Hash of the records and of the tables' names."""
        names = "\0".join(path.name for path in self._paths)
        return hashlib.sha256(self._records.digest() + names.encode()).hexdigest()


class _ArrowFile:
    """Record batches of a mapped file, in either of the two Arrow formats."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as stream:
            is_file = stream.read(len(_ARROW_FILE)) == _ARROW_FILE
            stream.seek(-len(_STREAM_END), os.SEEK_END)
            if not is_file and stream.read() != _STREAM_END:
                raise pa.ArrowInvalid("it has no end mark, so records after it may be lost")
        opened = pa.ipc.open_file if is_file else pa.ipc.open_stream
        table = opened(pa.memory_map(str(path))).read_all()
        self._batches = table.to_batches()
        for batch in self._batches:
            _check(batch)
        self._image = _image_name(path, table.schema.names)
        self.num_groups = len(self._batches)

    def text_rows(self, group: int) -> list[tuple[dict | Broken, int]]:
        """Each row without its images, and how many it has."""
        return _split(self._batches[group], self._image)

    def images(self, group: int) -> pa.Array:
        return self._batches[group].column(self._image)


class _ParquetFile:
    """Row groups of a Parquet file."""

    def __init__(self, path: Path) -> None:
        self._file = pq.ParquetFile(path)
        names = self._file.schema_arrow.names
        self._image = _image_name(path, names)
        leaves = [self._file.schema.column(c).path for c in range(len(self._file.schema.names))]
        of_image = [leaf for leaf in leaves if leaf.split(".")[0] == self._image]
        # The paths tell the number of images without their bytes.
        light = [leaf for leaf in of_image if leaf.endswith(".path")] or of_image
        self._light = [name for name in names if name != self._image] + light
        self.num_groups = self._file.num_row_groups

    def text_rows(self, group: int) -> list[tuple[dict | Broken, int]]:
        """Each row without its images, and how many it has."""
        return _split(self._file.read_row_group(group, columns=self._light), self._image)

    def images(self, group: int) -> pa.ChunkedArray:
        return self._file.read_row_group(group, columns=[self._image]).column(0)


@lru_cache(maxsize=256)
def _opened(path: Path) -> _ArrowFile | _ParquetFile:
    if pa is None:
        raise ValueError(f"reading {path.name} needs the package pyarrow: pip install pyarrow")
    with path.open("rb") as stream:
        check_not_in_place(path, stream.read(START))
    with _naming(path):
        return _ArrowFile(path) if path.suffix == ".arrow" else _ParquetFile(path)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """ValueError that names the file, for what pyarrow raises where one is damaged."""
    try:
        yield
    except (pa.ArrowException, OSError, IndexError, MemoryError, OverflowError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a whole {path.suffix} file: {error}; write it again") from None


@lru_cache(maxsize=_GROUPS_KEPT)
def _images(path: Path, group: int) -> pa.Array | pa.ChunkedArray:
    return _opened(path).images(group)


def _check(batch: pa.RecordBatch) -> None:
    """pa.ArrowInvalid where what a batch says of itself leads out of it, which would end the process.

    Texts are looked at as bytes: one that is no UTF-8 spoils its own row alone.
    """
    for column in batch.columns:
        column.validate()
        column.view(_as_bytes(column.type)).validate(full=True)


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    """The type, with bytes in the place of text."""
    if pa.types.is_string(kind):
        return pa.binary()
    if pa.types.is_large_string(kind):
        return pa.large_binary()
    if pa.types.is_struct(kind):
        return pa.struct([part.with_type(_as_bytes(part.type)) for part in kind])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_as_bytes(kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_as_bytes(kind.value_type)))
    return kind


def _image_name(path: Path, names: list[str]) -> str:
    found = [name for name in _IMAGE_COLUMNS if name in names]
    if len(found) != 1:
        raise ValueError(f"{path.name} must have one column out of {_IMAGE_COLUMNS}, got {names}")
    return found[0]


def _split(rows: pa.Table | pa.RecordBatch, image: str) -> list[tuple[dict | Broken, int]]:
    column = rows.column(image)
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        lengths = pc.call_function("list_value_length", [column])
        counts = [length or 0 for length in lengths.to_pylist()]
    else:
        counts = [int(valid) for valid in column.is_valid().to_pylist()]
    texts = rows.select([name for name in rows.schema.names if name != image])
    try:
        return list(zip(texts.to_pylist(), counts, strict=True))
    except ValueError:  # text of one of them that is no UTF-8, for one
        return [(_row(texts, number), count) for number, count in enumerate(counts)]


def _row(texts: pa.Table | pa.RecordBatch, number: int) -> dict | Broken:
    try:
        return texts.slice(number, 1).to_pylist()[0]
    except ValueError as error:
        return Broken(f"row {number} of its group cannot be read: {error}")
