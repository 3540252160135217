"""LLaVA JSON or JSON Lines beside a folder of images."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from llava_kd.data.sources.cache import build_once, default_cache
from llava_kd.data.sources.conversation import Record, Source, Turn, canonical, parse_record, read_records
from llava_kd.data.sources.entries import check_data_file, read_entries
from llava_kd.data.sources.packed import PackedRecords
from llava_kd.data.sources.pictures.image_paths import read_regular
from llava_kd.data.sources.pictures.missing_images import where_instead
from llava_kd.relative import looked_from

__all__ = ["LlavaJson", "Record", "Source", "Turn", "canonical", "parse_record"]

_CACHED_FROM_BYTES = 8 << 20
_LAYOUT = 3


def read_confined(root: Path, image: str, *, follow_symlinks: bool) -> bytes:
    """Bytes of `root/image`. ValueError if it is missing, or lies outside of `root`, also through a link.

    An absolute path is as good as another where it lies below `root`.
    """
    path = os.path.join(root, image)
    if os.path.isabs(image) or not follow_symlinks:
        _confine(root, image, path, follow_symlinks)
    try:
        return read_regular(path)
    except FileNotFoundError:
        advice = where_instead(root, image)
        raise ValueError(f"image {image!r} is missing below {root}: {advice}") from None
    except ValueError as error:
        raise ValueError(f"image {image!r} below {root}: {error}") from None


def _confine(root: Path, image: str, path: str, follow_symlinks: bool) -> None:
    if _is_below(os.path.realpath(path), _real(str(root))):
        return
    if not _is_below(os.path.normpath(path), os.path.abspath(root)):
        raise ValueError(
            f"image {image!r} is not below the image root {root}; set data.images to a folder above it"
        )
    if not follow_symlinks:
        raise ValueError(
            f"image {image!r} leaves the image root {root} through a symbolic link; point the image root at "
            "the real folder, or set data.follow_symlinks to true"
        )


@functools.lru_cache(maxsize=64)
def _real(root: str) -> str:
    return os.path.realpath(root)


def _is_below(path: str, root: str) -> bool:
    return path.startswith(os.path.join(root, ""))


def _all_records(path: Path) -> list[Record]:
    return read_records(read_entries(path), str(path))


class LlavaJson:
    """LLaVA JSON or JSON Lines and a folder of images.

    The whole file is read once, and a large one is kept packed in the cache under its hash. A record that
    cannot be used keeps its place.
    Images are opened only when asked for, and never outside `image_root`.
    """

    def __init__(
        self,
        path: str | Path,
        image_root: str | Path,
        *,
        follow_symlinks: bool = False,
        cache: str | Path | None = None,
    ) -> None:
        path, root = Path(path), Path(image_root)
        if not root.is_dir():
            raise ValueError(f"no image folder {root}{looked_from(root)}")
        check_data_file(path)
        self._name = path.name
        self._root = root.absolute()
        self._follow_symlinks = follow_symlinks
        with path.open("rb") as stream:
            self._fingerprint = hashlib.file_digest(stream, "sha256").hexdigest()
        if cache is None and path.stat().st_size < _CACHED_FROM_BYTES:
            self._records = PackedRecords.pack(_all_records(path))
            return
        folder = Path(cache or default_cache()) / f"records{_LAYOUT}-{self._fingerprint[:32]}"
        build_once(folder, lambda scratch: PackedRecords.pack(_all_records(path)).save(scratch))
        self._records = PackedRecords.open(folder)

    def __len__(self) -> int:
        return len(self._records)

    def record(self, i: int) -> Record:
        return self._records[i]

    def image_bytes(self, i: int, k: int) -> bytes:
        image = self._records[i].images[k]
        return read_confined(self._root, image, follow_symlinks=self._follow_symlinks)

    def name_of(self, i: int) -> str:
        return self._name

    @property
    def faults(self) -> Sequence[int]:
        """Numbers of the records that cannot be used."""
        return self._records.faults

    @property
    def fingerprint(self) -> str:
        """Hash of the file; the image files are not part of it."""
        return self._fingerprint
