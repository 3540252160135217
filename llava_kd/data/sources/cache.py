"""Things built once and read by every rank: a folder per content hash, made whole or not at all.

Each folder holds the checksums of its files; one that has changed since is made anew.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from llava_kd.checksums import checksum

logger = logging.getLogger(__name__)
_CHECKSUMS = "checksums.json"


def default_cache() -> Path:
    """`LLAVA_KD_CACHE`, or a folder below the user's cache."""
    return Path(os.environ.get("LLAVA_KD_CACHE", Path.home() / ".cache" / "llava_kd"))


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, filled by `build` if it is absent or damaged. Other processes that ask for it wait."""
    if folder.is_dir() and not _fault(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fault = _fault(folder) if folder.is_dir() else ""
        if folder.is_dir() and not fault:
            return folder
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            build(scratch)
            found = {path.name: checksum(path) for path in scratch.iterdir()}
            (scratch / _CHECKSUMS).write_text(json.dumps(found))
            if fault:
                logger.warning("the cache %s is built again: %s", folder, fault)
                folder.rename(scratch / "retired")  # whoever has it mapped keeps what is mapped
            scratch.rename(folder)
            shutil.rmtree(folder / "retired", ignore_errors=True)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _fault(folder: Path) -> str:
    """What is wrong with the files of a folder; nothing where they are as they were written."""
    try:
        expected = dict(json.loads((folder / _CHECKSUMS).read_bytes()))
        wrong = [name for name, value in expected.items() if checksum(folder / name) != value]
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except (ValueError, TypeError):
        return f"{_CHECKSUMS} is damaged"
    return f"{wrong[0]} has another checksum than when it was written" if wrong else ""
