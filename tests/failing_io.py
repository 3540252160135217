"""Calls to the system that fail at a chosen place: errors, short writes, a disk that stays full."""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from safetensors import SafetensorError

from llava_kd import tensor_files

_CALLS = ("open", "mkdir", "rename", "replace", "unlink", "rmdir", "fsync")
_FULL = ("open", "mkdir", "write", "save_file", "fsync")  # what needs room


@dataclass
class Fault:
    """Call number `at` fails with `error`, or writes one byte where `error` is `short`.

    `stays`: every later call that needs room fails too.
    """

    at: int
    error: str
    stays: bool = False
    count: int = 0
    happened: str = ""

    def is_due(self, call: str) -> bool:
        self.count += 1
        again = self.stays and self.count > self.at and call in _FULL
        if not again and self.count != self.at:
            return False
        if self.error == "short" and call != "write":
            return False
        self.happened = self.happened or call
        return True

    def before(self, call: str, path: object = None) -> None:
        if self.is_due(call):
            self.fail(path)

    def fail(self, path: object = None) -> None:
        number = getattr(errno, self.error)
        raise OSError(number, os.strerror(number), *([] if path is None else [os.fspath(path)]))

    @contextmanager
    def happening(self) -> Iterator[Fault]:
        with ExitStack() as patches:
            for name in _CALLS:
                patches.enter_context(mock.patch.object(os, name, self._around(name, getattr(os, name))))
            patches.enter_context(mock.patch.object(os, "write", self._write(os.write)))
            patches.enter_context(mock.patch.object(tensor_files, "save_file", self._save))
            for owner in (io, builtins):
                patches.enter_context(mock.patch.object(owner, "open", self._open))
            yield self

    def _around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            # The system's own error names the path, and that of a descriptor does not.
            self.before(name, args[0] if isinstance(args[0], str | os.PathLike) else None)
            return call(*args, **kwargs)

        return wrapped

    def _write(self, call: Callable[[int, Any], int]) -> Callable[[int, Any], int]:
        def wrapped(descriptor: int, data: Any) -> int:
            if self.is_due("write"):
                if self.error == "short":
                    return call(descriptor, data[:1])
                if self.error != "EINTR":  # then nothing was written
                    call(descriptor, data[: len(data) // 2])  # a part had room
                self.fail()
            return call(descriptor, data)

        return wrapped

    def _save(self, tensors: Any, path: Any, metadata: Any = None) -> None:
        """As safetensors fails: with an exception of its own, and a part of the file there."""
        _SAVE_FILE(tensors, path, metadata=metadata)
        if self.error != "short" and self.is_due("save_file"):
            os.truncate(path, os.stat(path).st_size // 2)
            number = getattr(errno, self.error)
            raise SafetensorError(f"Error: I/O error: {os.strerror(number)} (os error {number})")

    def _open(self, file: Any, mode: str = "r", buffering: int = -1, *how: Any, **named: Any) -> Any:
        if isinstance(file, int) or not set(mode) & set("wax+"):
            return _OPEN(file, mode, buffering, *how, **named)
        self.before("open", file)
        raw = _Raw(file, mode.replace("b", "").replace("t", ""))
        raw.fault = self
        if buffering == 0:
            return raw
        stream = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return stream if "b" in mode else io.TextIOWrapper(stream, *how[:3], **named)


class _Raw(io.FileIO):
    fault: Fault

    def write(self, data: Any, /) -> int:
        if self.fault.is_due("write"):
            if self.fault.error == "short":
                return super().write(bytes(data)[:1])
            if self.fault.error != "EINTR":
                super().write(bytes(data)[: len(data) // 2])
            self.fault.fail()
        return super().write(data)


_OPEN, _SAVE_FILE = io.open, tensor_files.save_file
