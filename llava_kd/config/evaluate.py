"""The settings of questions that are asked while a stage trains."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass, field

from llava_kd.config.checks import require


@dataclass(frozen=True, kw_only=True)
class SliceConfig:
    """Questions of a LLaVA JSON file with one question a record; null asks all of them."""

    data: str
    images: str | None = None
    num_questions: int | None = None


@dataclass(frozen=True, kw_only=True)
class HeldOutConfig:
    """Records as of `data`, talks of several turns too; the first `max_records`, null for all of them."""

    path: str
    images: str | None = None
    max_records: int | None = None

    def __post_init__(self) -> None:
        require(
            self.max_records is None or self.max_records > 0,
            f"`evaluate.losses.NAME.max_records` must be positive, got {self.max_records}; set "
            "it to null for all",
        )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Every `every` steps and at the end the student answers each slice; `slice/NAME` is its accuracy.

    `loss/NAME` is its mean cross-entropy per answer token over each of `losses`, given the answer so far.
    """

    every: int
    slices: dict[str, SliceConfig] = field(default_factory=dict)
    losses: dict[str, HeldOutConfig] = field(default_factory=dict)
    max_new_tokens: int = 16
    batch_size: int = 32

    def __post_init__(self) -> None:
        require(
            bool(self.slices or self.losses),
            "`evaluate.slices` is empty, and `evaluate.losses`; name at least one, or set evaluate to null",
        )
        for what, names in (("slices", self.slices), ("losses", self.losses)):
            odd = [name for name in names if "/" in name or name == "seconds"]
            require(not odd, f"`evaluate.{what}` may not be named {odd}: neither `seconds`, nor with a slash")


def check_best(best: str | None, export: str, slices: Collection[str], losses: Collection[str] = ()) -> None:
    """ValueError where `best` names no figure, or `export` asks for what is not kept."""
    figures = [*(f"slice/{name}" for name in slices), *(f"loss/{name}" for name in losses)]
    if best is not None and best not in figures:
        near = difflib.get_close_matches(best, figures, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(
            f"`checkpoint.best` is {best}, which no slice of `evaluate.slices` and none of "
            f"`evaluate.losses` gives{hint}; there are {figures or 'none'}"
        )
    require(
        export == "last" or best is not None,
        "`checkpoint.export` is best, but `checkpoint.best` names no figure; set it to slice/NAME "
        "or loss/NAME",
    )
