"""Where an image that is missing below the image root may be, for the message about it."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

_PARENTS = 3
_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")


def where_instead(root: Path, image: str) -> str:
    """What to change, where the file is found nearby; else only what to check."""
    for parent in list(root.parents)[:_PARENTS]:
        if not PurePosixPath(image).is_absolute() and _is_file(parent / image):
            return f"it is below {parent}; set data.images (--images) to that folder"
    for other in _spellings(image):
        if _is_file(root / other):
            return f"{other!r} is there; write the path so"
    return "check data.images (--images) and the path"


def _spellings(image: str) -> Iterator[str]:
    """The path as it would be below a deeper root, of a URL, of another system, and with other suffixes."""
    path = PurePosixPath(image)
    for k in range(1, len(path.parts)):
        yield str(PurePosixPath(*path.parts[k:]))
    yield unquote(image)
    yield image.strip()
    for form in ("NFC", "NFD"):
        yield unicodedata.normalize(form, image)
    for suffix in _SUFFIXES:
        yield str(path.with_suffix(suffix)) if path.name else image
    yield image.lower()


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, a folder that may not be read
        return False
