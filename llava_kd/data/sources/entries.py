"""The entries of a JSON or JSON Lines file, whatever it is named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from llava_kd.data.sources.conversation import TALKS, Broken
from llava_kd.relative import looked_from

_BOM = b"\xef\xbb\xbf"
_COMPRESSED = {
    "gzip": b"\x1f\x8b",
    "zip": b"PK\x03\x04",
    "bzip2": b"BZh",
    "xz": b"\xfd7zX",
    "zstd": b"\x28\xb5\x2f\xfd",
}
# What stands in the place of the records, by its first bytes in small letters, and what to do.
_NOT_RECORDS = {
    b"version https://git-lfs": "a pointer of Git LFS, not the file; run `git lfs pull` in its folder",
    b"<!doctype": "a web page; download the file itself",
    b"<html": "a web page; download the file itself",
}
_TABLES = (".csv", ".tsv", ".xlsx", ".xls")
START = 64


def loads(data: bytes) -> object:
    """The JSON value of some bytes. ValueError says why there is none."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("is nested too deeply; write it again, or fix it there") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"must be UTF-8 text, but byte {error.start} is not: {error.reason}; save it as UTF-8"
        ) from None
    except ValueError as error:  # also a number of too many digits
        raise ValueError(f"is not JSON: {error}; write it again, or fix it there") from None


def check_data_file(path: Path) -> None:
    """ValueError unless there is a regular file that is not compressed."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give {_in_folder(path)}")
    if not path.is_file():
        raise ValueError(f"no data file {path}{looked_from(path)}; give a LLaVA .json or .jsonl file")
    if path.suffix.lower() in _TABLES:
        raise ValueError(
            f"{path} is a table; `llava-kd init` makes records of it, and stages to train on them"
        )
    with path.open("rb") as stream:
        start = stream.read(START)
    for name, magic in _COMPRESSED.items():
        if start.startswith(magic):
            raise ValueError(f"{path} is compressed ({name}); unpack it, and give the file that is in it")
    if start.startswith(b"PAR1"):
        raise ValueError(f"{path} is a Parquet table; give a LLaVA .json or .jsonl file, or name it .parquet")
    check_not_in_place(path, start)


def check_not_in_place(path: Path, start: bytes) -> None:
    """ValueError where the first bytes are those of something that came in the place of the records."""
    for magic, what in _NOT_RECORDS.items():
        if start.removeprefix(_BOM).lstrip().lower().startswith(magic):
            raise ValueError(f"{path} is {what}")


def _in_folder(path: Path) -> str:
    """What to give in its place, by the files in it, or in the folder of tables and shards below it."""
    inside = sorted(part for part in path.iterdir() if part.suffix in (".json", ".jsonl"))
    if inside:
        return f"the one meant, of {', '.join(part.name for part in inside[:5])}"
    for suffix in (".parquet", ".tar", ".arrow"):
        for part in sorted([*path.glob(f"*{suffix}"), *path.glob(f"*/*{suffix}")])[:1]:
            return f"its {suffix} files: '{part.parent}/*{suffix}'"
    return "a LLaVA .json or .jsonl file"


def read_entries(path: Path) -> Iterator[object]:
    """Entries of a JSON list, or of JSON Lines, where a line that cannot be read is a `Broken` one.

    A list is one by its first character. JSON Lines may be named .json, and a lone record is read too.
    """
    check_data_file(path)
    with path.open("rb") as stream:
        is_list = stream.read(1024).removeprefix(_BOM).lstrip()[:1] == b"["
    if path.suffix == ".jsonl" and not is_list:
        yield from _lines(path)
        return
    try:
        whole = loads(path.read_bytes())
    except ValueError as error:
        if path.suffix == ".jsonl" or "Extra data" in str(error):
            yield from _lines(path)
            return
        raise ValueError(f"{path} {error}") from None
    if isinstance(whole, list):
        yield from whole
    elif isinstance(whole, dict) and any(key in whole for key in TALKS):
        yield whole
    else:
        raise ValueError(f"{path} must hold a list of records, got {_described(whole)}")


def _described(value: object) -> str:
    if not isinstance(value, dict):
        return type(value).__name__
    lists = [key for key, part in value.items() if isinstance(part, list)]
    where = f"; write the list of {lists[0]!r} alone" if lists else ""
    return f"an object with the keys {list(value)[:10]}{where}"


def _lines(path: Path) -> Iterator[object]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip() or line.strip() == _BOM:
                continue
            try:
                yield loads(line)
            except ValueError as error:
                yield Broken(f"line {number} {error}")
