"""The records without a fault, written out as a file that a run can use."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from llava_kd.data.sources.conversation import Record, Source
from llava_kd.data.sources.entries import read_entries
from llava_kd.durable import replacing, write_whole

_SPEAKERS = {"user": "human", "assistant": "gpt"}
_ROWS = 100


def write_sound_entries(path: Path, out: Path, unsound: Collection[int]) -> None:
    """Copy the others of a LLaVA file; `out` is JSON Lines where its name ends in .jsonl, else a list."""
    left_out = set(unsound)
    sound = (raw for position, raw in enumerate(read_entries(path)) if position not in left_out)
    write_whole(out, _as_lines(sound) if out.suffix == ".jsonl" else _as_list(sound))


def write_sound_records(source: Source, out: Path, unsound: Collection[int]) -> None:
    """Copy the other records of tables or shards, with their images, to a .tar, or a Parquet file."""
    left_out = set(unsound)
    sound = [i for i in range(len(source)) if i not in left_out]
    with replacing(out) as scratch:
        write = _write_tar if out.suffix == ".tar" else _write_parquet
        write(source, sound, scratch)


def _as_text(value: object) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half of a surrogate pair in a value that is not read
        return json.dumps(value).encode()


def _as_lines(entries: Iterable[object]) -> Iterator[bytes]:
    for raw in entries:
        yield _as_text(raw) + b"\n"


def _as_list(entries: Iterable[object]) -> Iterator[bytes]:
    before = b"[\n"
    for raw in entries:
        yield before + _as_text(raw)
        before = b",\n"
    yield b"[]\n" if before == b"[\n" else b"\n]\n"


def _entry(record: Record) -> dict:
    turns = [{"from": _SPEAKERS.get(turn.role, turn.role), "value": turn.text} for turn in record.turns]
    return {**record.extra, "id": record.id, "conversations": turns}


def _images(source: Source, i: int) -> list[bytes]:
    return [source.image_bytes(i, k) for k in range(len(source.record(i).images))]


def _write_tar(source: Source, sound: Iterable[int], out: Path) -> None:
    with tarfile.open(out, "w") as archive:
        for number, i in enumerate(sound):
            images = enumerate(_images(source, i))
            members = [(f"{k}.{_suffix(data)}", data) for k, data in images]
            for ending, data in [*members, ("json", _as_text(_entry(source.record(i))))]:
                member = tarfile.TarInfo(f"{number:09}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def _suffix(image: bytes) -> str:
    """A name that a shard takes for an image's; what it is, its bytes say."""
    return "png" if image.startswith(b"\x89PNG") else "jpg"


def _write_parquet(source: Source, sound: list[int], out: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    turn = pa.struct([("from", pa.string()), ("value", pa.string())])
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("id", pa.string()), ("conversations", pa.list_(turn)), ("images", pa.list_(image))])
    with pq.ParquetWriter(out, schema) as writer:
        for start in range(0, len(sound), _ROWS):
            rows = []
            for i in sound[start : start + _ROWS]:
                entry = _entry(source.record(i))
                images = [{"bytes": data, "path": None} for data in _images(source, i)]
                rows.append({"id": entry["id"], "conversations": entry["conversations"], "images": images})
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
