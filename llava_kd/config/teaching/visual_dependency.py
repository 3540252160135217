"""The settings of tokens that need the picture: how they are found, and what they weigh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval
from typing_extensions import Doc

from llava_kd.config.ranges import require


@dataclass(frozen=True, kw_only=True)
class VisualDependencyConfig:
    """The teacher is asked again without the picture; tokens that need it weigh more in the divergence."""

    by: Annotated[
        Literal["vds", "va"],
        Doc(
            "With and without the picture: divergence (VGS), or gain of the label's log-probability (VA-OPD)."
        ),
    ]
    picture: Annotated[Literal["grey", "pixelated", "blurred"], Doc("What replaces the picture.")] = "grey"
    cells: Annotated[
        int,
        Interval(ge=1, le=64),
        Doc("Number of squares per side that `pixelated` keeps; `blurred` is equally coarse."),
    ] = 4
    top: Annotated[
        float, Interval(gt=0, le=1), Doc("Share of a record's response tokens that get more weight.")
    ] = 0.2
    mass: Annotated[
        float,
        Interval(gt=0, le=1),
        Doc("Share of the record's weight that these tokens get; 1 drops the others."),
    ] = 0.5
    gamma: Annotated[
        float,
        Interval(ge=0, le=100),
        Doc("Weight of VGS's second target: student without the picture plus the teacher's gain; 0: none."),
    ] = 0.0

    def __post_init__(self) -> None:
        require(
            self.top <= self.mass,
            f"`teacher.visual_dependency.mass` ({self.mass:g}) must be at least `top` ({self.top:g}), or the "
            "tokens that need the picture would weigh less than the others",
        )

    def check_beside(self, *, cache: str | None, is_several: bool) -> None:
        """ValueError where no one teacher could be asked again."""
        require(
            cache is None or self.gamma == 0,
            f"`teacher.cache` ({cache}) stores only one number per token of the teacher's prediction "
            f"without the picture, but `teacher.visual_dependency.gamma` {self.gamma:g} needs the whole "
            "prediction: set gamma to 0, or teacher.cache to null",
        )
        require(
            not is_several,
            "`teacher.visual_dependency` works with one teacher, but `teacher.several` is set; set one of "
            "them to null",
        )

    def check_engine(self, engine_kind: str) -> None:
        """ValueError where the student cannot be asked again within its forward."""
        require(
            self.gamma == 0 or engine_kind in ("auto", "single", "ddp"),
            "`teacher.visual_dependency.gamma` runs the student twice in its forward, which was not "
            f"tested with `engine.kind` {engine_kind}; use auto, single or ddp, or set gamma to 0",
        )
