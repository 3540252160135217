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
    data: Annotated[str, Doc("LLaVA JSON file with one question per record.")]
    images: Annotated[str | None, Doc("Root folder of the images; null: the folder of `data`.")] = None
    num_questions: Annotated[PositiveInt | None, Doc("Number of questions to ask; null: all.")] = None


@dataclass(frozen=True, kw_only=True)
class HeldOutConfig:
    path: Annotated[
        str, Doc("Records in the format of `data.path`; conversations of several turns are allowed.")
    ]
    images: Annotated[str | None, Doc("Root folder of the images; null: the folder of `path`.")] = None
    max_records: Annotated[
        PositiveInt | None, Doc("Number of records to read, from the first on; null: all.")
    ] = None
    exchanged: Annotated[
        int,
        Ge(0),
        Doc("Number of first records to read again with another record's picture, for `picture_gain`."),
    ] = 64


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    every: Annotated[PositiveInt, Doc("Steps between evaluations; one also runs at the end.")]
    slices: Annotated[
        dict[str, SliceConfig], Doc("Test files that the student answers; `slice/NAME` is its accuracy.")
    ] = field(default_factory=dict)
    losses: Annotated[
        dict[str, HeldOutConfig],
        Doc("Held-out data for the loss; `loss/NAME` is the mean cross-entropy per token."),
    ] = field(default_factory=dict)
    max_new_tokens: Annotated[PositiveInt, Doc("Largest number of tokens in an answer.")] = 16
    batch_size: Annotated[PositiveInt, Doc("Questions per generation batch.")] = 32

    def __post_init__(self) -> None:
        require(
            bool(self.slices or self.losses),
            "`evaluate.slices` and `evaluate.losses` are both empty; name at least one, or set evaluate "
            "to null",
        )
        for what, names in (("slices", self.slices), ("losses", self.losses)):
            odd = [name for name in names if "/" in name or name == "seconds"]
            require(
                not odd,
                f"`evaluate.{what}` must have names without a slash, other than `seconds`; got {odd}: "
                "rename them",
            )


def check_best(best: str | None, export: str, slices: Collection[str], losses: Collection[str] = ()) -> None:
    """ValueError where `best` names no figure, or `export` asks for what is not kept."""
    figures = [*(f"slice/{name}" for name in slices), *(f"loss/{name}" for name in losses)]
    if best is not None and best not in figures:
        near = difflib.get_close_matches(best, figures, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(
            f"`checkpoint.best` is {best}, but neither `evaluate.slices` nor `evaluate.losses` gives this "
            f"figure{hint}; there are {figures or 'none'}"
        )
    require(
        export == "last" or best is not None,
        "`checkpoint.export` is best, but `checkpoint.best` is null; set it to slice/NAME or loss/NAME",
    )
