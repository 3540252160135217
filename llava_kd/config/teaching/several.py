"""The settings of several teachers: which, and how much each of them counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Interval, MinLen
from typing_extensions import Doc

from llava_kd.config.ranges import require


@dataclass(frozen=True, kw_only=True)
class SeveralConfig:
    """Teachers beside `teacher.checkpoint`, mixed where their probabilities are: KnFu."""

    checkpoints: Annotated[list[str], MinLen(1), Doc("Stock LLaVA directories of the additional teachers.")]
    weights: Annotated[
        Literal["uniform", "given", "histograms", "agreement"],
        Doc("Equal weights, `shares`, similarity of the teachers' `records` to `data`, or label likelihood."),
    ]
    beta: Annotated[
        float,
        Interval(ge=0, le=1e4),
        Doc("Sharpness of the weights of `histograms` and `agreement`; 0 is `uniform`."),
    ] = 10.0
    shares: Annotated[
        list[Annotated[float, Interval(gt=0, le=1)]],
        Doc("For `given`: weight of each teacher, `teacher.checkpoint` first; the sum must be 1."),
    ] = field(default_factory=list)
    records: Annotated[
        list[str],
        Doc("For `histograms`: training data of each teacher, or a sample of it, in the same order."),
    ] = field(default_factory=list)

    def __post_init__(self) -> None:
        number = 1 + len(self.checkpoints)
        for name, values, kind in (("shares", self.shares, "given"), ("records", self.records, "histograms")):
            key = f"teacher.several.{name}"
            if self.weights != kind:
                require(
                    not values,
                    f"`{key}` needs `teacher.several.weights` {kind}, but it is {self.weights}; change "
                    f"weights, or leave `{key}` out",
                )
                continue
            require(
                len(values) == number,
                f"`{key}` must have one entry for each of the {number} teachers, teacher.checkpoint first; "
                f"got {len(values)}",
            )
        if self.shares:
            require(
                abs(sum(self.shares) - 1) < 1e-6,
                f"`teacher.several.shares` must sum to 1; got {self.shares}, which sum to "
                f"{sum(self.shares):g}",
            )

    def check_beside(self, checkpoint: str, cache: str | None) -> None:
        """ValueError where the same teacher is named twice, or a cache would stand in for all of them."""
        require(
            cache is None,
            f"`teacher.cache` ({cache}) stores the predictions of one teacher, but `teacher.several` is "
            "set: set one of them to null",
        )
        names = [checkpoint, *self.checkpoints]
        places = [Path(name).resolve() for name in names]
        doubled = [name for i, name in enumerate(names) if places[i] in places[:i]]
        require(
            not doubled,
            "`teacher.several.checkpoints` must name each teacher once, and not teacher.checkpoint; "
            f"{' and '.join(doubled)} is there twice: remove one, and use `shares` to give it more weight",
        )
