"""Files of records as they come: what is read, and what stands in their place is named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from data_samples import entry, write_dataset

from llava_kd.data.sources.kinds import Place, open_source
from llava_kd.data.sources.llava_json import LlavaJson, parse_record

ENTRIES = [entry(i, images=i % 3) for i in range(4)]
LINES = "".join(json.dumps(raw) + "\n" for raw in ENTRIES)
FILES = {
    "lines named .json": ("a.json", LINES.encode()),
    "a list named .jsonl": ("a.jsonl", json.dumps(ENTRIES, indent=1).encode()),
    "BOM": ("b.json", b"\xef\xbb\xbf" + json.dumps(ENTRIES).encode()),
    "BOM and lines": ("b.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
    "CRLF": ("c.jsonl", LINES.replace("\n", "\r\n").encode()),
    "UTF-16": ("d.json", json.dumps(ENTRIES).encode("utf-16")),
}


@pytest.mark.parametrize(("name", "content"), FILES.values(), ids=FILES.keys())
def test_files_as_they_come(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    source = LlavaJson(tmp_path / name, tmp_path)
    assert [source.record(i) for i in range(len(source))] == [parse_record(raw, 0) for raw in ENTRIES]


BROKEN_LINES = {
    "cut": (b'{"id": "r", "conv', "is not JSON"),
    "not UTF-8": (b'{"id": "caf\xe9"}', "must be UTF-8 text, but byte 11 is not"),
    "deep": (b"[" * 100_000, "is nested too deeply"),
    "huge number": (b'{"id": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
}


@pytest.mark.parametrize(("line", "reason"), BROKEN_LINES.values(), ids=BROKEN_LINES.keys())
def test_a_broken_line_is_one_bad_record(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(LINES.encode() + line + b"\n" + LINES.encode())
    source = LlavaJson(path, tmp_path)
    assert (len(source), source.faults) == (9, (4,))
    assert f"record '4': line 5 {reason}" in source.record(4).fault or reason in source.record(4).fault
    path = tmp_path / "d.json"
    path.write_bytes(b"[" + line)
    with pytest.raises(ValueError, match=r"d.json (is|must)"):
        LlavaJson(path, tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("d.json", "[1", "is not JSON"),
        ("d.json", b'["caf\xe9"]', "must be UTF-8 text, but byte 5 is not"),
        ("d.json", b"\xef\xbb\xbf[]", "has no records"),
        ("d.jsonl", b"[]\r\n\r\n\xff", "line 3 must be UTF-8 text"),
        ("d.json", "{}", "must hold a list"),
        ("d.json", '{"data": [1]}', "write the list of 'data' alone"),
        ("d.json", "3", "must hold a list of records, got int"),
        ("d.json", "[]", "has no records"),
        ("d.json", "[3]", "position 0 must be an object"),
        ("d.jsonl", '{"id": 1}\n{', "line 2 is not JSON"),
        ("d.jsonl", '{"id": 1}', "no conversations"),
        ("d.jsonl", "", "has no records"),
    ],
)
def test_unreadable_file_is_an_error(tmp_path: Path, name: str, text: str | bytes, reason: str) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ValueError, match=reason):
        LlavaJson(path, tmp_path)


def test_missing_file_and_folder_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no data file"):
        LlavaJson(tmp_path / "d.json", tmp_path)
    with pytest.raises(ValueError, match="no image folder"):
        LlavaJson(tmp_path / "d.json", tmp_path / "images")


def test_folder_and_packed_file_are_named_as_such(tmp_path: Path) -> None:
    path = write_dataset(tmp_path, [entry(0)])
    with pytest.raises(ValueError, match=f"is a folder; give the one meant, of {path.name}"):
        LlavaJson(tmp_path, tmp_path)
    packed = tmp_path / "d.json.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ValueError, match=r"is compressed \(gzip\); unpack it"):
        LlavaJson(packed, tmp_path)


@pytest.mark.parametrize(
    ("name", "start", "said"),
    [
        ("d.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer of Git LFS"),
        ("d.jsonl", b"\n<!DOCTYPE html><html>", "is a web page; download the file itself"),
        ("d.json", b"PAR1\0\0", "is a Parquet table"),
        ("d.csv", b"image,question,answer\n", "is a table; `llava-kd init` makes records"),
        ("d.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer of Git LFS"),
    ],
)
def test_what_came_in_the_place_of_records_is_named(
    tmp_path: Path, name: str, start: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(start)
    with pytest.raises(ValueError, match=said):
        open_source(Place(path=str(tmp_path / name)))


def test_a_folder_of_tables_or_shards_says_what_to_give(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(ValueError, match=r"is a folder; give a LLaVA .json"):
        LlavaJson(tmp_path, tmp_path)
    (tmp_path / "data" / "train-00000-of-00001.parquet").touch()
    with pytest.raises(ValueError, match=r"give its .parquet files: '.*/data/\*.parquet'"):
        LlavaJson(tmp_path, tmp_path)
