"""Pictures of test questions inside a page."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from llava_kd.evaluation.generation.pictures import open_picture


def thumbnails(run_dir: Path, names: str) -> str:
    """Each picture of a question, whose answer names them in one string, with spaces between."""
    return (
        f'<div class="shots">{"".join(_thumbnail(run_dir, name) for name in _separate(run_dir, names))}</div>'
    )


def _separate(run_dir: Path, names: str) -> list[str]:
    """The same for paths that have spaces themselves: a path ends where there is such a file."""
    found: list[str] = []
    rest = ""
    for word in names.split(" "):
        rest = f"{rest} {word}" if rest else word
        if _picture(run_dir, Path(rest)) is not None:
            found.append(rest)
            rest = ""
    return found or [names]


def _thumbnail(run_dir: Path, name: str, side: int = 224) -> str:
    """An <img> with the picture inside; nothing where the file is gone."""
    path = _picture(run_dir, Path(name))
    if path is None:
        return ""
    try:
        image = open_picture(path)
    except (ValueError, OSError):
        return ""
    style = ' class="tiny"' if max(image.size) < 112 else ""
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    if style:
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    kind = "png" if style else "jpeg"
    return f'<img{style} alt="test image" src="data:image/{kind};base64,{data}">'


def _picture(run_dir: Path, name: Path) -> Path | None:
    """The file as named, or, from another directory or after a move, where the run still has it."""
    parts = name.parts
    inside = [run_dir / Path(*parts[k:]) for k in range(1, len(parts))]
    beside = [parent / name for parent in run_dir.resolve().parents]
    return next((path for path in (name, run_dir / name, *inside, *beside) if path.is_file()), None)
