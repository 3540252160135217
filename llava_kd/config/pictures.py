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

    translate: Annotated[Share, Doc("Farthest move, as a share of the side; 0 is none, here and below.")] = (
        0.25
    )
    scale: Annotated[float, Interval(ge=0, le=4), Doc("Most that a picture grows: by 1 + scale.")] = 0.25
    rotate: Annotated[float, Interval(ge=0, le=180), Doc("Largest turn, in degrees.")] = 15.0
    crop: Annotated[float, Interval(ge=0, lt=1), Doc("Most that is cut off, as a share of the side.")] = 0.25
    colour: Annotated[Share, Doc("Largest change of brightness, contrast and saturation.")] = 0.25
    blur: Annotated[float, Interval(ge=0, le=16), Doc("Strongest blur, a standard deviation in pixels.")] = (
        1.0
    )
    lr: Annotated[PositiveFloat, Doc("Rate of the augmentor's own Adam.")] = 1e-2
    student_weight: Annotated[PositiveFloat, Doc("lambda_S, of what the student disagrees with.")] = 1.0
    teacher_weight: Annotated[
        NotNegativeFloat, Doc("lambda_T, of what the teacher says otherwise than before the change.")
    ] = 1.0
    lower: Annotated[
        NotNegativeFloat, Doc("Disagreement, in nats a token, at which the augmentor's turn comes.")
    ] = 0.1
    upper: Annotated[PositiveFloat, Doc("Disagreement at which the student's turn comes.")] = 0.5
    keep_prompts: Annotated[
        str | None, Doc("Regular expression; records with it in a question keep their pictures. Null: none.")
    ] = GEOMETRY
    keep_types: Annotated[
        list[str], Doc("Records of these question types, their `type`, keep their pictures.")
    ] = field(default_factory=list)
    show_every: Annotated[
        NotNegativeInt, Doc("Steps between pictures of what it makes, in `pictures/`; 0 is none.")
    ] = 500

    def __post_init__(self) -> None:
        require(
            self.lower < self.upper,
            f"`pictures.hard.lower` ({self.lower}) must lie below `pictures.hard.upper` ({self.upper}): the "
            "augmentor's turn comes at the lower one and ends at the upper one",
        )
        ranges = (self.translate, self.scale, self.rotate, self.crop, self.colour, self.blur)
        require(
            any(ranges),
            "`pictures.hard` may change nothing: translate, scale, rotate, crop, colour and blur are 0; set "
            "one to more, or pictures.hard to null",
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

    share: Annotated[float, Interval(gt=0, le=1), Doc("Of the pictures of a micro-batch.")] = 0.1
    alpha: Annotated[
        float, Interval(gt=0), Le(100), Doc("What is kept of a picture is drawn from Beta(alpha, alpha).")
    ] = 1.0


@dataclass(frozen=True, kw_only=True)
class PicturesConfig:
    """One change at a time."""

    hard: Annotated[HardConfig | None, Doc("Learned changes that are hard for the student (HARD).")] = None
    mixup: Annotated[MixupConfig | None, Doc("Blends of two pictures (partial mixup).")] = None

    def __post_init__(self) -> None:
        require(
            (self.hard is None) != (self.mixup is None),
            "`pictures` needs one of hard and mixup, and no more; set the other to null, or pictures itself",
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
            f"`{name}` asks the teacher about pictures, but `teacher` is null; set it, or leave {name} out"
        )
    require(
        teacher.placement == "replicated",
        f"`{name}` asks the teacher within the student's forward, where it must be whole on every rank; set "
        f"teacher.placement to replicated instead of {teacher.placement}",
    )
    require(
        teacher.several is None,
        f"`{name}` asks one teacher about pictures, but `teacher.several` is set; set one of them to null",
    )
    require(
        teacher.visual_dependency is None,
        f"`{name}` changes the pictures and `teacher.visual_dependency` withholds them, and they were never "
        "tried together; set one of them to null",
    )
    if pictures.hard is None:
        return
    require(
        teacher.quantize is None,
        "`pictures.hard` needs a gradient through the teacher to the pixels, which weights of "
        f"{teacher.quantize} do not give as they are; set teacher.quantize to null",
    )
    require(
        "response_kl" in terms,
        f"`pictures.hard` takes its divergence from objective.response_kl, which is not among the terms "
        f"{', '.join(terms)}; add it",
    )
    require(
        engine_kind in ("auto", "single", "ddp"),
        "`pictures.hard` runs backwards through the student by itself, beside the backward of the engine, "
        f"which `engine.kind` {engine_kind} does not allow for; use auto, single or ddp",
    )
