"""Where a relative path starts: from where the command is given, not from the file that names it."""

from __future__ import annotations

from pathlib import Path


def looked_from(*paths: str | Path) -> str:
    """Behind paths that lead nowhere: the folder from which they were looked for, if any is relative."""
    if all(Path(path).is_absolute() for path in paths):
        return ""
    return f" (looked for from {Path.cwd()}, where the command was given)"
