"""A user's own Python file, or importable module, found by the name that the settings give and imported.

A file is imported under a name that its content decides, so that the same content is the same module in
every process, and a process that finds other content says so.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class PluginFile:
    """`name` as the user wrote it; `where` is an absolute path, or the name of a module."""

    name: str
    where: str
    sha256: str

    def module(self) -> ModuleType:
        """The module, imported once a process. ValueError where it cannot be, or is no longer what it was."""
        if _sha256(self.where, self.name) != self.sha256:
            raise ValueError(
                f"plug-in {self.name} changed while the run uses it; restore the file, or start again"
            )
        if not _is_file(self.where):
            return _imported(self.name, lambda: importlib.import_module(self.where))
        unique = f"llava_kd_plugin_{re.sub(r'[^0-9A-Za-z]', '_', Path(self.where).stem)}_{self.sha256[:16]}"
        if unique in sys.modules:
            return sys.modules[unique]
        return _imported(self.name, lambda: _from_file(unique, self.where))


def find(name: str) -> PluginFile:
    """The plug-in of that name: a path that ends in .py, from the working directory on, or a module.

    Raises ValueError where there is none. A file is not imported yet.
    """
    if _is_file(name):
        path = Path(name).absolute()
        if not path.is_file():
            raise ValueError(
                f"plug-in {name} is not there: no file {path}; a path starts from the working directory"
            )
        where = str(path)
    elif all(part.isidentifier() for part in name.split(".")):
        if name.split(".")[0] == "llava_kd":
            raise ValueError(f"plug-in {name} is a module of this package, whose tables hold it already")
        where = name
    else:
        raise ValueError(
            f"plug-in {name!r} is neither a path that ends in .py nor the name of a module; name one of them"
        )
    return PluginFile(name=name, where=where, sha256=_sha256(where, name))


def _is_file(where: str) -> bool:
    return where.endswith(".py")


def _sha256(where: str, name: str) -> str:
    """Of the file, or of every Python file of a package."""
    paths = [Path(where)] if _is_file(where) else _module_files(where, name)
    digest = hashlib.sha256()
    for path in paths:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ValueError(f"plug-in {name} cannot be read: {error}") from error
        digest.update(f"{path.name} {len(content)} ".encode() if len(paths) > 1 else b"")
        digest.update(content)
    return digest.hexdigest()


def _module_files(where: str, name: str) -> list[Path]:
    spec = _imported(name, lambda: importlib.util.find_spec(where))
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise ValueError(
            f"plug-in {name} is not there: no module of that name can be imported; for a file give a path "
            "that ends in .py"
        )
    if spec.submodule_search_locations is None:
        return [Path(spec.origin)]
    return sorted(Path(spec.origin).parent.rglob("*.py"))


def _from_file(unique: str, path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(unique, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[unique] = module  # dataclasses and pickles look for it there
    try:
        spec.loader.exec_module(module)
    except BaseException:  # Ctrl-C too leaves no half-run module behind; it is raised again
        del sys.modules[unique]
        raise
    return module


def _imported(name: str, run: Callable[[], T]) -> T:
    try:
        return run()
    except (Exception, SystemExit) as error:
        raise ValueError(f"plug-in {name} cannot be imported: {described(error)}") from error


def described(error: BaseException) -> str:
    """One line: the kind of the error, its words, and the line where it was raised."""
    words = " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    line = f" (line {frames[-1].lineno} of {Path(frames[-1].filename).name})" if frames else ""
    if isinstance(error, SyntaxError):
        line = ""
    return f"{type(error).__name__}: {words}{line}"
