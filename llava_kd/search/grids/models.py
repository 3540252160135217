"""The model directories that a grid starts from, which may not change while it runs."""

from __future__ import annotations

import hashlib
from pathlib import Path

from llava_kd.search.grids.sharing import Plan, flat

_PIECE = 1 << 20
_FIRST = ("student.vision_tower", "student.language_model", "student.checkpoint")


def model_prints(plan: Plan) -> dict[str, str]:
    """By path, for those that are directories here; a model id of a hub names its own version."""
    paths = set()
    for stage in plan.stages.values():
        settings = flat(stage.tree)
        names = ("teacher.checkpoint", *(_FIRST if stage.parent is None else ()))
        paths |= {str(settings[name]) for name in names if settings.get(name) is not None}
    return {path: _print(Path(path)) for path in sorted(paths) if Path(path).is_dir()}


def _print(directory: Path) -> str:
    """Names and sizes of all files, their first and last MiB: other weights differ everywhere."""
    digest = hashlib.sha256()
    for path in sorted(p for p in directory.iterdir() if p.is_file() and p.suffix != ".md"):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as stream:
            digest.update(stream.read(_PIECE))
            stream.seek(max(0, size - _PIECE))
            digest.update(stream.read(_PIECE))
    return digest.hexdigest()[:16]
