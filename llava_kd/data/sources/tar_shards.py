"""Tar shards in the WebDataset layout, read at random by offset.

A record is the members that share a key, the name up to the first dot of its last part: `KEY.json` holds the
LLaVA entry, and `KEY.jpg`, or `KEY.0.jpg`, `KEY.1.png`, ... its images in the order of the placeholders, or
those that the entry names by their file names, in its order. As in img2dataset's shards, `KEY.txt`, or
`caption` in the .json, may stand in the place of a talk.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from llava_kd.data.pixels.images import SUFFIXES
from llava_kd.data.sources.cache import build_once, default_cache
from llava_kd.data.sources.conversation import (
    IMAGE_PLACEHOLDER,
    TALKS,
    Broken,
    Record,
    entry_with_images,
    read_records,
)
from llava_kd.data.sources.entries import loads
from llava_kd.data.sources.packed import PackedRecords
from llava_kd.data.sources.pictures.image_paths import IMAGE_KEYS
from llava_kd.data.sources.tar_walk import walk

_CACHED_FROM_BYTES = 64 << 20
_LAYOUT = 3
_SHOWN = 10
_Place = tuple[int, int, int]  # shard, offset, size


class TarShards:
    """Records of uncompressed tar files. Their headers are read once; the cache keeps those of large ones."""

    def __init__(self, paths: Sequence[str | Path], *, cache: str | Path | None = None) -> None:
        self._paths = tuple(Path(path) for path in paths)
        if not self._paths:
            raise ValueError("no tar shards were given")
        if missing := [str(path) for path in self._paths if not path.is_file()]:
            raise ValueError(f"no tar shard {', '.join(missing)}")
        stats = [path.stat() for path in self._paths]
        if cache is None and sum(stat.st_size for stat in stats) < _CACHED_FROM_BYTES:
            records, self._places, self._first = _scan(self._paths)
            self._records = PackedRecords.pack(records)
        else:
            key = repr(
                [
                    (str(p.resolve()), s.st_size, s.st_mtime_ns)
                    for p, s in zip(self._paths, stats, strict=True)
                ]
            )
            name = f"tar{_LAYOUT}-{hashlib.sha256(key.encode()).hexdigest()[:32]}"
            folder = build_once(Path(cache or default_cache()) / name, self._build)
            self._records = PackedRecords.open(folder)
            self._places = np.load(folder / "places.npy", mmap_mode="r")
            self._first = np.load(folder / "first.npy", mmap_mode="r")
        self._files: dict[int, int] = {}

    def _build(self, folder: Path) -> None:
        records, places, first = _scan(self._paths)
        PackedRecords.pack(records).save(folder)
        np.save(folder / "places.npy", places)
        np.save(folder / "first.npy", first)

    def __len__(self) -> int:
        return len(self._records)

    def record(self, i: int) -> Record:
        return self._records[i]

    def image_bytes(self, i: int, k: int) -> bytes:
        shard, offset, size = self._places[self._first[i] + k].tolist()
        if shard not in self._files:
            self._files[shard] = os.open(self._paths[shard], os.O_RDONLY)
        return os.pread(self._files[shard], size, offset)

    def name_of(self, i: int) -> str:
        first = self._first[i]
        return self._paths[int(self._places[first, 0])].name if first < self._first[i + 1] else "tar"

    @property
    def faults(self) -> Sequence[int]:
        """Numbers of the records that cannot be used."""
        return self._records.faults

    @property
    def fingerprint(self) -> str:
        """Hash of the records and of the places of their images."""
        return hashlib.sha256(self._records.digest() + np.asarray(self._places).tobytes()).hexdigest()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": {}}  # open files stay in their process


def _scan(paths: Sequence[Path]) -> tuple[list[Record], np.ndarray, np.ndarray]:
    """Records, the place of each image, and the number of images before each record."""
    entries: list[dict | Broken] = []
    places: list[list[_Place]] = []
    for shard, path in enumerate(paths):
        seen: set[str] = set()
        for key, members in _samples(path):
            try:
                _check_together(key, seen)
                entry, images = _entry(path, key, members)
            except ValueError as error:
                entry, images = Broken(f"of {path.name} {error}", key), []
            entries.append(entry)
            places.append([(shard, member.offset_data, member.size) for member in images])
    records = read_records(entries, ", ".join(path.name for path in paths))
    first = np.cumsum([0, *(len(of_record) for of_record in places)], dtype=np.int64)
    flat = [place for of_record in places for place in of_record]
    return records, np.array(flat, dtype=np.int64).reshape(-1, 3), first


def _samples(path: Path) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Key and members by extension; the members of a record follow each other. Hidden files are none."""
    key, members = "", {}
    for member in walk(path):
        folder, _, base = member.name.rpartition("/")
        if not member.isfile() or base.startswith("."):  # such as `._NAME`, which tar of macOS adds
            continue
        stem, _, extension = base.partition(".")
        if members and f"{folder}/{stem}" != key:
            yield key.lstrip("/"), members
            members = {}
        key = f"{folder}/{stem}"
        members[extension.lower()] = member
    if members:
        yield key.lstrip("/"), members


def _check_together(key: str, seen: set[str]) -> None:
    """ValueError for a key that came before: its record is in pieces, a text without its images for one."""
    if key in seen:
        raise ValueError(
            "is in two places of the shard; the files of a record must follow each other: sort them by name"
        )
    seen.add(key)


def _entry(path: Path, key: str, members: dict[str, tarfile.TarInfo]) -> tuple[dict, list[tarfile.TarInfo]]:
    """The entry of a record, and its images; as img2dataset writes shards, a caption stands for the talk."""
    extensions = [e for e in members if e.rpartition(".")[2] in SUFFIXES]
    extensions.sort(key=lambda e: (len(e.split(".")[0]) if e[0].isdigit() else 0, e))
    images = [members[extension] for extension in extensions]
    if "json" not in members and "txt" not in members:
        dots = any(extension.endswith((".json", ".txt")) for extension in members)
        advice = "; the name of a record ends at its first dot, so write it without dots" if dots else ""
        raise ValueError(f"has no .json and no .txt among {sorted(members)[:_SHOWN]}{advice}")
    raw: object = {}
    if "json" in members:
        try:
            raw = loads(_bytes(path, members["json"]))
        except ValueError as error:
            raise ValueError(f"has a .json that {error}") from None
    images = _as_named(raw, images)
    if isinstance(raw, dict) and not any(talk in raw for talk in TALKS):
        raw = {"id": key, "conversations": _captioned(path, raw, members.get("txt"), len(images))}
    return entry_with_images(raw, key, [member.name.lstrip("/") for member in images]), images


def _as_named(raw: object, images: list[tarfile.TarInfo]) -> list[tarfile.TarInfo]:
    """The images that the entry names, in its order; as they are where it names others, or none."""
    given = next((raw[key] for key in IMAGE_KEYS if raw.get(key)), None) if isinstance(raw, dict) else None
    names = [given] if isinstance(given, str) else given if isinstance(given, list) else []
    members = {member.name.rpartition("/")[2]: member for member in images}
    named = [members.get(str(name).rpartition("/")[2]) for name in names]
    return [member for member in named if member is not None] if named and None not in named else images


def _captioned(path: Path, raw: dict, text: tarfile.TarInfo | None, images: int) -> list[dict]:
    caption = raw.get("caption")
    if text is not None:
        try:
            caption = _bytes(path, text).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"has a .txt that must be UTF-8, but byte {error.start} is not") from None
    if not isinstance(caption, str):
        raise ValueError(
            "has no conversations and no caption; its .json must hold `conversations`, or a .txt the caption"
        )
    if not images:
        raise ValueError("has a caption but no image")
    asked = {"from": "human", "value": "\n".join([IMAGE_PLACEHOLDER] * images)}
    return [asked, {"from": "gpt", "value": caption}]


def _bytes(path: Path, member: tarfile.TarInfo) -> bytes:
    with path.open("rb") as stream:
        stream.seek(member.offset_data)
        return stream.read(member.size)
