"""Where a relative path starts: from where the command is given, not from the file that names it."""

from __future__ import annotations

from pathlib import Path


def looked_from(path: str | Path) -> str:
    """Behind a path that leads nowhere: the folder from which it was looked for, if it is relative."""
    if Path(path).is_absolute():
        return ""
    return f" (looked for from {Path.cwd()}, where the command was given)"
