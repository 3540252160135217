"""The settings of questions that are asked while a stage trains."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge
from typing_extensions import Doc

from llava_kd.config.ranges import PositiveInt, require


@dataclass(frozen=True, kw_only=True)
class SliceConfig:
    data: Annotated[str, Doc("LLaVA JSON file with one question a record.")]
    images: Annotated[str | None, Doc("Image root; null is the folder of `data`.")] = None
    num_questions: Annotated[PositiveInt | None, Doc("How many are asked; null is all.")] = None


@dataclass(frozen=True, kw_only=True)
class HeldOutConfig:
    path: Annotated[str, Doc("Records as of `data.path`, talks of several turns too.")]
    images: Annotated[str | None, Doc("Image root; null is the folder of `path`.")] = None
    max_records: Annotated[PositiveInt | None, Doc("How many of the first are read; null is all.")] = None
    exchanged: Annotated[
        int,
        Ge(0),
        Doc("How many of the first are read again with each other's pictures, for `picture_gain`."),
    ] = 64


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    every: Annotated[PositiveInt, Doc("Steps from one time to the next; it is asked at the end as well.")]
    slices: Annotated[
        dict[str, SliceConfig], Doc("Questions that the student answers; `slice/NAME` is its accuracy.")
    ] = field(default_factory=dict)
    losses: Annotated[
        dict[str, HeldOutConfig],
        Doc("Answers that it is given; `loss/NAME` is its mean cross-entropy per token."),
    ] = field(default_factory=dict)
    max_new_tokens: Annotated[PositiveInt, Doc("Most tokens of an answer.")] = 16
    batch_size: Annotated[PositiveInt, Doc("Questions that are answered together.")] = 32

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
