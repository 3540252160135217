"""The models of a demo, by what a person calls them: a stock directory, a run, a hub id, or NAME=one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from llava_kd.evaluation.demo.asking import Respondent
from llava_kd.evaluation.generation.generate import Generator
from llava_kd.evaluation.generation.model_directory import model_directory, run_name

MOST = 4


def named(words: Sequence[str]) -> dict[str, Path]:
    """Their directories by the name that each is shown under. ValueError for what is no model."""
    if not 1 <= len(words) <= MOST:
        raise ValueError(f"the page shows 1 to {MOST} models, got {len(words)}")
    found: dict[str, Path] = {}
    for word in words:
        name, is_named, place = word.partition("=")
        if Path(word).exists() or not is_named:
            name, place = "", word
        directory = model_directory(_of_run(Path(place)) or place)
        name = name.strip() or run_name(directory)
        if name in found:
            raise ValueError(f"two models would be shown as {name!r}: rename one, NAME={place}")
        found[name] = directory
    return found


def load(words: Sequence[str], *, max_new_tokens: int) -> list[Respondent]:
    """ValueError for a model that cannot be read, or answers no question."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [
        Respondent(name, Generator.load(directory, device=device, max_new_tokens=max_new_tokens))
        for name, directory in named(words).items()
    ]


def _of_run(place: Path) -> Path | None:
    """The student of a run's directory; None for a directory of another kind."""
    if (place / "config.json").is_file() or not place.is_dir():
        return None
    if (place / "model" / "config.json").is_file():
        return place / "model"
    if (place / "run.json").is_file() or (place / "metrics.jsonl").is_file():
        raise ValueError(f"the run {place} has no finished student yet; the same training command goes on")
    return None
