"""Checksums of what is read again later: of a file, and of a table that holds its own."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

_CHUNK_BYTES = 1 << 24


def checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            value = zlib.crc32(chunk, value)
    return value


def meta_checksum(meta: Mapping[str, object]) -> int:
    """Of what a JSON file says, but for its entry `checksum` itself."""
    said = {name: value for name, value in meta.items() if name != "checksum"}
    return zlib.crc32(json.dumps(said, sort_keys=True).encode())


def sealed(meta: Mapping[str, object]) -> dict[str, object]:
    """The table, with its checksum."""
    return {**meta, "checksum": meta_checksum(meta)}
