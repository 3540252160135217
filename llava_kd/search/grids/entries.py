"""Entries of the files that a user writes: what they may be, and what is said where they are not."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


def named(name: object, where: str) -> str:
    """It becomes the name of a directory."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{where} must have a name of letters, digits and . _ + -; got {name!r}")
    return name


def mapping(entry: object, where: str) -> Mapping:
    if entry is None:
        return {}
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where} must be `key: value` lines; got {entry!r}")
    return entry


def listed(entry: object, where: str) -> list:
    if entry is None:
        return []
    if not isinstance(entry, list):
        raise ValueError(f"{where} must be a list; got {entry!r}")
    return entry


def only(tree: Mapping, known: set[str], where: str) -> None:
    for key in tree:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}{near(str(key), known)}")


def near(name: object, known: Iterable[object]) -> str:
    names = sorted(map(str, known))
    found = difflib.get_close_matches(str(name), names, n=1)
    meant = f" (did you mean {found[0]}?)" if found else ""
    return f"{meant}; choose from {', '.join(names) or 'none'}"
