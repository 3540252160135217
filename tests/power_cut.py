"""A disk that forgets: every state that a power cut may leave of a folder, while code writes into it.

`Disk` watches the calls that change a folder and its files, in this process, and keeps two pictures: what is
there, and what has been synced. A cut leaves the synced picture and any part of the rest: names that were
made, moved or removed since their folder was last synced are old or new, one by one; bytes since a file's
last sync are gone, zeros, zeros in part, cut in the middle, or there. A cut that leaves all is a kill.
"""

from __future__ import annotations

import itertools
import os
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

Tree = dict[str, bytes | None]  # of a folder: content by path, None for a folder in it
_ROOT = 0
_CHANGES = ("rename", "replace", "unlink", "remove", "rmdir", "mkdir", "truncate", "ftruncate", "write")
_ALL_SUBSETS = 5  # of so many names at most; of more: every first part, and each alone missing


@dataclass(frozen=True)
class Moment:
    """The two pictures before or after a call; `marks` are what the code had promised by then."""

    after: str
    marks: tuple[str, ...]
    names: Mapping[int, Mapping[str, int]]
    synced: Mapping[int, bytes]
    pending: Sequence[Mapping[tuple[int, str], int | None]]
    now: Mapping[int, bytes]
    folders: frozenset[int]

    def trees(self) -> Iterator[Tree]:
        """What a disk may show if the power goes now."""
        for chosen in _subsets(len(self.pending)):
            names = {folder: dict(entries) for folder, entries in self.names.items()}
            for change in (self.pending[i] for i in chosen):
                for (folder, name), item in change.items():
                    entries = names.setdefault(folder, {})
                    if item is None:
                        entries.pop(name, None)
                    else:
                        entries[name] = item
            for files in self._contents():
                tree: Tree = {}
                self._lay_out(_ROOT, "", names, files, tree)
                yield tree

    def _contents(self) -> Iterator[dict[int, bytes]]:
        dirty = [item for item, data in self.now.items() if self.synced.get(item) != data]
        ways = [[way] * len(dirty) for way in (_lost, _zeros, _half, _hole, _whole)]
        alone = {0, len(dirty) // 2, len(dirty) - 1} if len(dirty) > 1 else ()  # that are not there
        ways += [[_lost if i == j else _whole for j in range(len(dirty))] for i in alone]
        for way in ways:
            files = dict(self.synced)
            for item, choose in zip(dirty, way, strict=True):
                files[item] = choose(self.synced.get(item, b""), self.now[item])
            yield files

    def _lay_out(
        self, folder: int, path: str, names: Mapping, files: Mapping[int, bytes], tree: Tree
    ) -> None:
        for name, item in names.get(folder, {}).items():
            tree[path + name] = None if item in self.folders else files.get(item, b"")
            if item in self.folders:
                self._lay_out(item, f"{path}{name}/", names, files, tree)


def _lost(before: bytes, now: bytes) -> bytes:
    return before


def _zeros(before: bytes, now: bytes) -> bytes:
    kept = before if now.startswith(before) else b""
    return kept + b"\0" * (len(now) - len(kept))


def _half(before: bytes, now: bytes) -> bytes:
    kept = len(before) if now.startswith(before) else 0
    return now[: kept + (len(now) - kept) // 2]


def _hole(before: bytes, now: bytes) -> bytes:
    """Pages come to disk in any order."""
    half = len(_half(before, now))
    return _zeros(before, now)[:half] + now[half:]


def _whole(before: bytes, now: bytes) -> bytes:
    return now


def _subsets(count: int) -> Iterator[tuple[int, ...]]:
    everything = range(count)
    if count <= _ALL_SUBSETS:
        for size in range(count + 1):
            yield from itertools.combinations(everything, size)
        return
    yield from (tuple(range(size)) for size in range(count + 1))
    yield from (tuple(i for i in everything if i != missing) for missing in everything)


@dataclass
class Disk:
    """`forgets`: `file` or `folder` where syncs of those do nothing, as in code that leaves them out."""

    root: Path
    forgets: str = ""
    moments: list[Moment] = field(default_factory=list)
    calls: int = 0

    def __post_init__(self) -> None:
        self._lock = threading.RLock()
        self._ids = {os.stat(self.root).st_ino: _ROOT}
        self._next = 1
        self._marks: tuple[str, ...] = ()
        self._pending: list[dict[tuple[int, str], int | None]] = []
        self._now: dict[int, bytes] = {}
        self._names, self._now = self._look()  # what is there at the beginning is on disk
        self._there = {folder: dict(entries) for folder, entries in self._names.items()}
        self._folders = set(self._names)
        self._synced = dict(self._now)
        self._keep("begin")

    def mark(self, promise: str) -> None:
        """From here on `promise` must hold whatever happens."""
        with self._lock:
            self._marks = (*self._marks, promise)
            self._see("mark")

    @contextmanager
    def watching(self) -> Iterator[Disk]:
        patches = [mock.patch.object(os, name, self._around(getattr(os, name))) for name in _CHANGES]
        patches += [mock.patch.object(os, name, self._sync) for name in ("fsync", "fdatasync")]
        for patch in patches:
            patch.start()
        try:
            yield self
        finally:
            for patch in patches:
                patch.stop()
        self._see("end")

    def trees(self) -> Iterator[tuple[Moment, Tree]]:
        """Every different state, with the first moment at which a cut may leave it."""
        seen = set()
        for moment in reversed(self.moments) if self.forgets else self.moments:
            for tree in moment.trees():
                key = hash((moment.marks, tuple(sorted(tree.items(), key=lambda item: item[0]))))
                if key not in seen:
                    seen.add(key)
                    yield moment, tree

    def _around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                self._see(f"before {call.__name__}")  # what other calls did since the last
                result = call(*args, **kwargs)
                self.calls += 1
                self._see(call.__name__, is_one=True)
                return result

        return wrapped

    def _sync(self, descriptor: int) -> None:
        with self._lock:
            self._see("before fsync")
            self.calls += 1
            found = os.fstat(descriptor)
            item = self._ids.get(found.st_ino)
            kind = "folder" if stat.S_ISDIR(found.st_mode) else "file"
            if item is None or kind == self.forgets:
                return
            if kind == "folder":
                self._keep_names(item)
            else:
                self._synced[item] = self._now[item]
            self._keep(f"fsync of a {kind}")

    def _keep_names(self, folder: int) -> None:
        left = []
        for i, change in enumerate(self._pending):
            if not any(place == folder for place, _ in change):
                left.append(change)
                continue
            for (place, name), item in change.items():
                if item is None:
                    self._names.get(place, {}).pop(name, None)
                else:
                    self._names.setdefault(place, {})[name] = item
                for earlier in self._pending[:i]:
                    earlier.pop((place, name), None)  # it must not come back
        self._pending = [change for change in left if change]

    def _see(self, after: str, *, is_one: bool = False) -> None:
        """Notice what has changed; the changes of one call come to disk together."""
        there, self._now = self._look()
        changes: list[tuple[tuple[int, str], int | None]] = []
        for folder in {*there, *self._there}:
            old, new = self._there.get(folder, {}), there.get(folder)
            if new is None:  # removed with what it held
                continue
            names = {**old, **new}
            changes += [((folder, n), new.get(n)) for n in names if old.get(n) != new.get(n)]
        if changes:
            self._pending += [dict(changes)] if is_one else [dict([change]) for change in changes]
        self._there = {folder: dict(entries) for folder, entries in there.items()}
        self._folders |= set(there)
        self._keep(after)

    def _keep(self, after: str) -> None:
        self.moments.append(
            Moment(
                after,
                self._marks,
                {folder: dict(entries) for folder, entries in self._names.items()},
                dict(self._synced),
                [dict(change) for change in self._pending],
                dict(self._now),
                frozenset(self._folders),
            )
        )

    def _look(self) -> tuple[dict[int, dict[str, int]], dict[int, bytes]]:
        names: dict[int, dict[str, int]] = {}
        files: dict[int, bytes] = {}
        ids: dict[int, int] = {}
        todo = [self.root]
        while todo:
            folder = todo.pop()
            entries = names.setdefault(self._id(folder, ids), {})
            for entry in os.scandir(folder):
                entries[entry.name] = self._id(Path(entry.path), ids)
                if entry.is_dir(follow_symlinks=False):
                    todo.append(Path(entry.path))
                else:
                    item, data = entries[entry.name], Path(entry.path).read_bytes()
                    before = self._now.get(item)
                    files[item] = before if before == data else data  # every moment holds it
        self._ids = ids  # a number that is free is given to the next file
        return names, files

    def _id(self, path: Path, ids: dict[int, int]) -> int:
        number = os.stat(path, follow_symlinks=False).st_ino
        if number not in ids:
            known = self._ids.get(number)
            if known is None:
                known, self._next = self._next, self._next + 1
            ids[number] = known
        return ids[number]


@contextmanager
def quick_folder(otherwise: Path) -> Iterator[Path]:
    """In memory where there is such a place: hundreds of states are laid out, and no disk is needed."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield otherwise
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def lay_out(tree: Tree, folder: Path) -> Path:
    """Make `folder` what the disk shows."""
    folder.mkdir()
    for path, content in sorted(tree.items(), key=lambda item: item[0]):
        if content is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(content)
    return folder
