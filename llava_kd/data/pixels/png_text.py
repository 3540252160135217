"""PNG files without the text that editors leave in them, which Pillow reads, and bounds, with the picture."""

from __future__ import annotations

from collections.abc import Iterator

_MAGIC = b"\x89PNG\r\n\x1a\n"
_TEXT = (b"tEXt", b"zTXt", b"iTXt")
_FRAME = 12  # bytes of a chunk beside its data: length, name, checksum


def without_text(data: bytes) -> bytes:
    """The same picture without its text chunks; what is no PNG, or has none, is given back as it is."""
    if not data.startswith(_MAGIC) or not any(name in data for name in _TEXT):
        return data
    kept = [data[start:stop] for name, start, stop in _chunks(data) if name not in _TEXT]
    return b"".join([_MAGIC, *kept])


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and stop of each chunk; the last one may be cut."""
    place = len(_MAGIC)
    while place < len(data):
        stop = place + _FRAME + int.from_bytes(data[place : place + 4])
        yield data[place + 4 : place + 8], place, stop
        place = stop
