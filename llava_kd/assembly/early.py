"""What can be seen to be wrong in a moment: before PyTorch is imported, which takes seconds.

Everything here is looked at again, in full, by the command itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def look_at_stage(path: str | Path, overrides: Sequence[str]) -> None:
    """ValueError for a stage file that is missing or no YAML, and for a teacher that is not there.

    Settings outside of `objective` that are unknown or of another type are told, too.
    """
    from llava_kd.config.reading import check_early  # late, like all imports here: `--help` needs none

    tree = check_early(path, overrides)
    teacher = tree.get("teacher")
    if isinstance(teacher, dict) and isinstance(name := teacher.get("checkpoint"), str):
        look_at_checkpoint(name)


def look_at_file(path: str, what: str, hint: str) -> None:
    if not Path(path).is_file():
        raise ValueError(f"no {what} file {path}; {hint}")


def look_at_source(path: str) -> None:
    """Of `convert`."""
    is_gguf = Path(path).is_file() if path.endswith(".gguf") else any(Path(path).glob("*.gguf"))
    if not is_gguf and not (Path(path) / "config.json").is_file():
        raise ValueError(
            f"{path} has no config.json; give a TinyLLaVA, LLaVA-KD or LLaVA-1.5 directory, or a GGUF file"
        )


def look_at_model(name: str) -> None:
    """Of a command that asks a model: ValueError for a path that is not there."""
    from llava_kd.models.other_kinds import existing
    from llava_kd.models.tower_source import nearest_neighbours

    if Path(name).is_dir():
        return
    try:
        existing(name, "the model")
    except ValueError:
        raise ValueError(f"no model directory {name}{nearest_neighbours(Path(name))}") from None


def look_at_checkpoint(name: str) -> None:
    """Of one that trains, or writes a model: ValueError for a path that is not there, or holds no model."""
    from llava_kd.models.other_kinds import existing

    existing(name, "the LLaVA checkpoint")


def look_at_runs(named: Sequence[str]) -> None:
    """Of `report`: ValueError where nothing is named, or no run is there."""
    from llava_kd.evaluation.report.stage_runs import named_runs

    named_runs(named)
