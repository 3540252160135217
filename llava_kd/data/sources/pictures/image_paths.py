"""Paths of images, as files of other tools and systems write them, and the bytes behind them."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path, PurePosixPath

IMAGE_KEYS = ("image", "images")
_SHOWN = 80
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_LOCAL = "file://"  # before the absolute path, as in talks for Qwen-VL
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")


def image_path(given: object) -> str:
    """The path with forward slashes, also from {path: ...}. ValueError for what names no file of the root."""
    if isinstance(given, dict) and not given.get("bytes"):
        given = given.get("path")
    if not isinstance(given, str) or not given:
        raise ValueError(f"`image` must be a path or a list of paths, got {str(given)[:_SHOWN]!r}")
    shown = repr(given[:_SHOWN])
    given = given.removeprefix(_LOCAL)
    if given.startswith("data:"):
        raise ValueError(
            f"the image {shown} is written into the text; save it as a file below the image root, or use "
            "Parquet or tar shards"
        )
    if _ADDRESS.match(given):
        raise ValueError(
            f"the image {shown} is a URL, not a file; download it below the image root, and give its path "
            "relative to the root"
        )
    if _DRIVE.match(given):
        raise ValueError(f"the image path {shown} has a drive letter; give it relative to the image root")
    path = given.replace("\\", "/")
    if ".." in PurePosixPath(path).parts or "\0" in path:
        raise ValueError(f"the image path {shown} must stay below the image root; write it without ..")
    return path


def named(error: Exception, image: str) -> str:
    """What is wrong with an image, with its path once."""
    return str(error) if repr(image) in str(error) else f"image {image!r}: {error}"


def read_regular(path: str | Path) -> bytes:
    """The bytes of a file. ValueError for what is none, such as a pipe, which would be waited for."""
    with open(path, "rb", opener=_without_waiting) as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise ValueError("it must be a regular file")
        return stream.read()


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)
