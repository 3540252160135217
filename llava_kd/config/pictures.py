"""The settings of changes of pictures, and what they need of the others."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Interval, Le
from typing_extensions import Doc

from llava_kd.config.models import TeacherConfig
from llava_kd.config.ranges import NotNegativeFloat, NotNegativeInt, PositiveFloat, Share, require

# What a move, a turn or a crop may make another question of, in English.
GEOMETRY = (
    r"(?i)\b(left|right|above|below|under|over|top|bottom|upper|lower|corner|cent(er|re)|middle|edge|next to|"
    r"beside|between|behind|where|position|location|coordinates?|bounding box|row|column|nearest|farthest|"
    r"outermost|read|text|written|letters?|words?|says?|how (big|large|far)|size|clock|angle|direction)\b"
)


@dataclass(frozen=True, kw_only=True)
class HardConfig:
    """Changes that are learned: student and teacher are to disagree, the teacher is to keep its answer."""

    translate: Annotated[Share, Doc("Largest shift, as a share of the side; 0 is none, also below.")] = 0.25
    scale: Annotated[float, Interval(ge=0, le=4), Doc("Largest enlargement: by a factor of 1 + scale.")] = (
        0.25
    )
    rotate: Annotated[float, Interval(ge=0, le=180), Doc("Largest rotation, in degrees.")] = 15.0
    crop: Annotated[float, Interval(ge=0, lt=1), Doc("Largest crop, as a share of the side.")] = 0.25
    colour: Annotated[Share, Doc("Largest change of brightness, contrast and saturation.")] = 0.25
    blur: Annotated[float, Interval(ge=0, le=16), Doc("Largest blur, as a standard deviation in pixels.")] = (
        1.0
    )
    lr: Annotated[PositiveFloat, Doc("Learning rate of the augmentor's Adam.")] = 1e-2
    student_weight: Annotated[
        PositiveFloat, Doc("lambda_S, weight of the student's disagreement with the teacher.")
    ] = 1.0
    teacher_weight: Annotated[
        NotNegativeFloat, Doc("lambda_T, weight of the change in the teacher's predictions.")
    ] = 1.0
    lower: Annotated[
        NotNegativeFloat, Doc("Disagreement, in nats per token, at which the augmentor starts to train.")
    ] = 0.1
    upper: Annotated[PositiveFloat, Doc("Disagreement at which the student starts to train.")] = 0.5
    keep_prompts: Annotated[
        str | None,
        Doc("Regular expression; records whose question matches it keep their pictures. Null: none."),
    ] = GEOMETRY
    keep_types: Annotated[
        list[str], Doc("Records whose `type` (question type) is listed keep their pictures.")
    ] = field(default_factory=list)
    show_every: Annotated[
        NotNegativeInt, Doc("Steps between samples of changed pictures, saved in `pictures/`; 0 is none.")
    ] = 500

    def __post_init__(self) -> None:
        require(
            self.lower < self.upper,
            f"`pictures.hard.lower` ({self.lower}) must be below `pictures.hard.upper` ({self.upper}): the "
            "augmentor starts at the lower one and stops at the upper one",
        )
        ranges = (self.translate, self.scale, self.rotate, self.crop, self.colour, self.blur)
        require(
            any(ranges),
            "`pictures.hard` changes nothing, because translate, scale, rotate, crop, colour and blur are "
            "0; set one above 0, or pictures.hard to null",
        )
        try:
            re.compile(self.keep_prompts or "")
        except re.error as error:
            raise ValueError(
                "`pictures.hard.keep_prompts` must be a regular expression; got "
                f"{self.keep_prompts!r}: {error}"
            ) from None


@dataclass(frozen=True, kw_only=True)
class MixupConfig:
    """Some pictures are blended with others; only the terms that read the teacher train on these."""

    share: Annotated[float, Interval(gt=0, le=1), Doc("Share of the pictures of a micro-batch to blend.")] = (
        0.1
    )
    alpha: Annotated[
        float,
        Interval(gt=0),
        Le(100),
        Doc("The share kept of a blended picture is drawn from Beta(alpha, alpha)."),
    ] = 1.0


@dataclass(frozen=True, kw_only=True)
class PicturesConfig:
    """One change at a time."""

    hard: Annotated[
        HardConfig | None, Doc("Learned changes of the pictures that are hard for the student (HARD).")
    ] = None
    mixup: Annotated[MixupConfig | None, Doc("Blends of two pictures (partial mixup).")] = None

    def __post_init__(self) -> None:
        require(
            (self.hard is None) != (self.mixup is None),
            "`pictures` needs exactly one of hard and mixup; set the other to null, or `pictures` to null",
        )


def check_pictures(
    pictures: PicturesConfig, teacher: TeacherConfig | None, terms: Collection[str], engine_kind: str
) -> None:
    """ValueError where a change of pictures does not fit the teacher, the terms or the engine.

    A cached teacher is refused with all else that needs the teacher itself.
    """
    name = "pictures.hard" if pictures.hard is not None else "pictures.mixup"
    if teacher is None:
        raise ValueError(
            f"`{name}` needs a teacher, but `teacher` is null; set teacher.checkpoint, or leave {name} out"
        )
    require(
        teacher.placement == "replicated",
        f"`{name}` runs the teacher within the student's forward, so the teacher must be whole on every "
        f"rank; set teacher.placement to replicated instead of {teacher.placement}",
    )
    require(
        teacher.several is None,
        f"`{name}` works with one teacher, but `teacher.several` is set; set one of them to null",
    )
    require(
        teacher.visual_dependency is None,
        f"`{name}` changes the pictures and `teacher.visual_dependency` removes them, which was never "
        "tested together; set one of them to null",
    )
    if pictures.hard is None:
        return
    require(
        teacher.quantize is None,
        "`pictures.hard` needs a gradient through the teacher to the pixels, but weights quantized to "
        f"{teacher.quantize} give none; set teacher.quantize to null",
    )
    require(
        "response_kl" in terms,
        "`pictures.hard` uses the divergence of objective.response_kl, but the terms are "
        f"{', '.join(terms)}; add response_kl",
    )
    require(
        engine_kind in ("auto", "single", "ddp"),
        f"`pictures.hard` runs its own backward through the student, which `engine.kind` {engine_kind} "
        "does not support; use auto, single or ddp",
    )
