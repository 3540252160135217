"""The members of a tar file, all of them: `tarfile` alone takes a damaged header for the end of the file."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

_END_BYTES = 2 * tarfile.BLOCKSIZE  # of zeros, behind the last member
_CHUNK_BYTES = 1 << 20
_CHECKSUM = slice(148, 156)  # of a header
_FORMS = (b"%06o\0 ", b"%6o\0 ", b"%07o\0", b"%7o\0")  # in which writers write it


def walk(path: Path) -> Iterator[tarfile.TarInfo]:
    """Each member in order. ValueError, with the offset, where the file is damaged, cut or no tar."""
    place, size = 0, path.stat().st_size
    try:
        with tarfile.open(path, "r:") as archive, path.open("rb") as stream:
            forms = {*_FORMS, b""}
            for member in archive:
                forms &= _forms(stream.fileno(), member)
                if not forms:
                    raise tarfile.ReadError(
                        f"the header of {member.name!r} has another form than those before"
                    )
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"the file ends within {member.name!r}")
                place = archive.offset
                yield member
            _check_end(stream.fileno(), archive.offset, size)
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        raise ValueError(
            f"{path} is not a whole, uncompressed tar file: after byte {place}: {error}; download or write "
            "it again"
        ) from None


def _forms(descriptor: int, member: tarfile.TarInfo) -> set[bytes]:
    """How the checksum is written, the one field that it does not cover itself."""
    field = os.pread(descriptor, tarfile.BLOCKSIZE, member.offset_data - tarfile.BLOCKSIZE)[_CHECKSUM]
    return {form for form in _FORMS if form % member.chksum == field} or {b""}


def _check_end(descriptor: int, start: int, size: int) -> None:
    """Zeros to the end of the file, and enough of them: a header that cannot be read is no end."""
    for place in range(start, size, _CHUNK_BYTES):
        if any(os.pread(descriptor, _CHUNK_BYTES, place)):
            raise tarfile.ReadError(f"the header at byte {start} is damaged, or another archive follows")
    if size - start < _END_BYTES:
        raise tarfile.ReadError(f"it is cut: no {_END_BYTES} zeros are at its end")
