"""The settings of questions that are asked while a stage trains."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass

from llava_kd.config.checks import require


@dataclass(frozen=True, kw_only=True)
class SliceConfig:
    """Questions of a LLaVA JSON file with one question a record; null asks all of them."""

    data: str
    images: str | None = None
    num_questions: int | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Every `every` steps and at the end the student answers each slice; `slice/NAME` is its accuracy."""

    every: int
    slices: dict[str, SliceConfig]
    max_new_tokens: int = 16
    batch_size: int = 32

    def __post_init__(self) -> None:
        require(bool(self.slices), "`evaluate.slices` is empty; name at least one, or set evaluate to null")
        odd = [name for name in self.slices if "/" in name or name == "seconds"]
        require(not odd, f"`evaluate.slices` may not be named {odd}: neither `seconds`, nor with a slash")


def check_best(best: str | None, export: str, slices: Collection[str]) -> None:
    """ValueError where `best` names no figure, or `export` asks for what is not kept."""
    figures = [f"slice/{name}" for name in slices]
    if best is not None and best not in figures:
        near = difflib.get_close_matches(best, figures, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(
            f"`checkpoint.best` is {best}, which no slice of `evaluate.slices` gives{hint}; there are "
            f"{figures or 'none'}"
        )
    require(
        export == "last" or best is not None,
        "`checkpoint.export` is best, but `checkpoint.best` names no figure; set it to slice/NAME",
    )
