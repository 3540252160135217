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

    checkpoints: Annotated[list[str], MinLen(1), Doc("Stock LLaVA directories of the others.")]
    weights: Annotated[
        Literal["uniform", "given", "histograms", "agreement"],
        Doc("All alike, by `shares`, by how like `data` their `records` are, or how likely its labels."),
    ]
    beta: Annotated[
        float, Interval(ge=0, le=1e4), Doc("How sharply `histograms` and `agreement` weigh; 0 is `uniform`.")
    ] = 10.0
    shares: Annotated[
        list[Annotated[float, Interval(gt=0, le=1)]],
        Doc("For `given`: of each teacher, that of `teacher.checkpoint` first; their sum is 1."),
    ] = field(default_factory=list)
    records: Annotated[
        list[str],
        Doc("For `histograms`: what each teacher was tuned on or a sample of it, in the same order."),
    ] = field(default_factory=list)

    def __post_init__(self) -> None:
        number = 1 + len(self.checkpoints)
        for name, values, kind in (("shares", self.shares, "given"), ("records", self.records, "histograms")):
            key = f"teacher.several.{name}"
            if self.weights != kind:
                require(
                    not values,
                    f"`{key}` belongs to `teacher.several.weights` {kind}; got weights {self.weights}",
                )
                continue
            require(
                len(values) == number,
                f"`{key}` needs one of each of the {number} teachers, that of teacher.checkpoint first; got "
                f"{len(values)}",
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
            f"`teacher.cache` ({cache}) holds what one teacher says, but `teacher.several` is set: set one "
            "of them to null",
        )
        names = [checkpoint, *self.checkpoints]
        places = [Path(name).resolve() for name in names]
        doubled = [name for i, name in enumerate(names) if places[i] in places[:i]]
        require(
            not doubled,
            f"`teacher.several.checkpoints` names the teacher {' and '.join(doubled)} twice; name each "
            "directory once, teacher.checkpoint among them, and give it more weight by `shares`",
        )
