"""Seconds of work on a results directory, added up over calls, also over one that was killed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llava_kd.durable import write_text

NAME = "time.json"


def seconds_spent(directory: Path) -> float:
    return _read(directory)[0]


@contextmanager
def counted(directory: Path) -> Iterator[None]:
    """Add what the block takes. A call before that never left its block ended with its last answer."""
    spent, since = _read(directory)
    if since is not None:
        last = max(path.stat().st_mtime for path in [directory / NAME, *directory.glob("answers*.jsonl")])
        spent += max(0.0, last - since)
    began = time.time()
    _write(directory, spent, began)
    start = time.perf_counter()
    try:
        yield
    finally:
        _write(directory, spent + time.perf_counter() - start, None)


def _read(directory: Path) -> tuple[float, float | None]:
    path = directory / NAME
    if not path.is_file():
        return 0.0, None
    found = json.loads(path.read_text(encoding="utf-8"))
    return found["seconds"], found["since"]


def _write(directory: Path, seconds: float, since: float | None) -> None:
    write_text(directory / NAME, json.dumps({"seconds": round(seconds, 3), "since": since}) + "\n")
