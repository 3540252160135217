"""The table of data sources by file suffix, and how a path is opened with it."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from llava_kd.data.sources.conversation import Source
from llava_kd.data.sources.llava_json import LlavaJson
from llava_kd.data.sources.tar_shards import TarShards
from llava_kd.relative import looked_from


class FileSource(Source, Protocol):
    """A source that knows its unusable records; each keeps its place and has a `fault`."""

    @property
    def faults(self) -> Sequence[int]: ...


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where records are, from the settings `data.path`, `data.images` and `data.follow_symlinks`."""

    path: str
    images: str | None = None
    follow_symlinks: bool = False

    @property
    def image_root(self) -> str | Path:
        """The folder that image paths are relative to: `images`, or the folder of the file."""
        return self.images or Path(self.path).parent

    def files(self) -> list[str]:
        """The files that match the path, which may be a pattern, sorted. ValueError if there is none."""
        paths = sorted(glob.glob(self.path))
        if not paths:
            raise ValueError(f"`data.path` {self.path} matches no file{looked_from(self.path)}")
        return paths


@dataclass(frozen=True, kw_only=True)
class SourceKind:
    """How files of one suffix are opened.

    `holds_images`: the files contain their images, so `images` is refused. `is_llava`: LLaVA JSON, whose
    sound entries are copied unchanged; sound records of other kinds are written with their images.
    """

    open: Callable[[Place], FileSource]
    holds_images: bool = True
    is_llava: bool = False


def _llava_json(place: Place) -> FileSource:
    return LlavaJson(place.path, place.image_root, follow_symlinks=place.follow_symlinks)


def _tar_shards(place: Place) -> FileSource:
    return TarShards(place.files())


def _tables(place: Place) -> FileSource:
    paths = place.files()
    from llava_kd.data.sources.tables import Tables  # needs the optional package pyarrow

    return Tables(paths)


_LLAVA = SourceKind(open=_llava_json, holds_images=False, is_llava=True)
# A file of any other suffix is read as LLaVA JSON.
SOURCES: Mapping[str, SourceKind] = {
    ".json": _LLAVA,
    ".jsonl": _LLAVA,
    ".tar": SourceKind(open=_tar_shards),
    ".parquet": SourceKind(open=_tables),
    ".arrow": SourceKind(open=_tables),
}


def kind_of(path: str, sources: Mapping[str, SourceKind] = SOURCES) -> SourceKind:
    return sources.get(Path(path).suffix, _LLAVA)


def open_source(place: Place, sources: Mapping[str, SourceKind] = SOURCES) -> FileSource:
    """The records there. ValueError if they cannot be read, or if they hold images and `images` is given."""
    kind = kind_of(place.path, sources)
    if kind.holds_images and place.images is not None:
        raise ValueError(f"{place.path} holds its images; remove `images` ({place.images})")
    return kind.open(place)
