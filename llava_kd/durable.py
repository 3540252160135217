"""Files that a power cut leaves whole: what is written here is on the disk when the call returns.

A new file is written beside its place, synced, and moved there; then its folder is synced too, since that is
where its name is kept. What grows line by line (`Lines`) is not synced at every line: it may lose its end,
and whoever reads it drops a line that was cut off.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

# Of a folder: the file system has no such call, or the folder may be entered but not read.
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)
_THREADS = 8  # syncs of many small files wait for the disk, and it takes them together


def sync(path: Path) -> None:
    """Force a written file, or the names in a folder, to disk."""
    is_folder = path.is_dir()
    with named(path):
        try:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            if not (is_folder and error.errno in _NO_FOLDER_SYNC):
                raise


def sync_tree(folder: Path) -> None:
    """Force a folder to disk with all that is in it."""
    paths = [path for path in folder.rglob("*") if not path.is_symlink()]
    if len(paths) < _THREADS:
        for path in paths:
            sync(path)
    else:
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(sync, paths))
    sync(folder)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it that are not there; their names are on disk too."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing or [path]:
        sync(folder.parent)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """The system's error of a write does not say of which file; give it the name."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where the block writes the new content of `path`: it takes that name in one move, or leaves nothing.

    Raises OSError where it cannot be written; what stood there stays then.
    """
    scratch = path.with_name(f".{path.name}.partial")
    try:
        with named(path):
            yield scratch
            sync(scratch)
            scratch.replace(path)
            sync(path.parent)
    finally:
        with suppress(OSError):  # the next writer of that name takes its place
            scratch.unlink(missing_ok=True)


def write_whole(path: Path, pieces: Iterable[bytes]) -> None:
    """Replace `path` in one move: a reader sees the old content or the new, never a part."""
    with replacing(path) as scratch, scratch.open("wb") as stream:
        stream.writelines(pieces)


def write_text(path: Path, text: str) -> None:
    """`write_whole` of UTF-8, with line ends as they are."""
    write_whole(path, [text.encode("utf-8")])


def put_folder(scratch: Path, folder: Path) -> None:
    """Give a finished folder its name. One that stood there goes once the new one is on disk."""
    sync_tree(scratch)
    retired = folder.with_name(f".{folder.name}.retired")
    if folder.exists() or folder.is_symlink():
        if retired.exists():
            delete(retired)
        folder.rename(retired)
    try:
        scratch.rename(folder)
    except OSError:
        if retired.exists():
            retired.rename(folder)
        raise
    sync(folder.parent)
    if retired.exists() or retired.is_symlink():
        delete(retired)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Where the block writes a whole folder: it takes that name at the end, or nothing of it stays.

    Raises OSError where it cannot be written; what stood there stays then.
    """
    scratch = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        make_folder(scratch)
    except OSError as error:
        error.filename = str(folder)  # which the user has named
        raise
    try:
        yield scratch
        put_folder(scratch, folder)
    except BaseException:  # Ctrl-C too leaves nothing half-written; it is raised again
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def delete(path: Path) -> None:
    """A folder with all in it, a file, or a link, not what that leads to."""
    if not path.is_dir() or path.is_symlink():
        path.unlink()
        return
    try:
        shutil.rmtree(path)
    except OSError as error:
        error.filename = str(path)  # it says no more than the name of a file in there
        raise


class Lines:
    """A file that grows by whole lines, handed to the system at once; `sync` forces them to disk."""

    def __init__(self, path: Path) -> None:
        """Nothing is opened before the first line."""
        self.path = path
        self._descriptor: int | None = None

    def write(self, text: str) -> None:
        """Append `text`, which ends with a line end. OSError, naming the file, where that is not possible."""
        with named(self.path):
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            rest = memoryview(text.encode("utf-8"))
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]

    def sync(self) -> None:
        """Force what was written to disk, and the name of the file."""
        if self._descriptor is None:
            return
        with named(self.path):
            os.fsync(self._descriptor)
        sync(self.path.parent)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
