"""The divergence from the teacher at the visual tokens themselves: their own output, not shifted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from annotated_types import Interval
from typing_extensions import Doc

from llava_kd.distill.rows import Place
from llava_kd.distill.terms.kl import KL
from llava_kd.distill.terms.term import VISUAL_TOKENS, Denominator, HeadRequest, Reads
from llava_kd.models.attention.answers import LookedAtBy


@dataclass(frozen=True, kw_only=True)
class VisualKL(KL):
    """With a `share`, a mean over the visual tokens of each image that the teacher attends to most.

    `weighed`: by w_n = N a_n / sum a, a what its text attends to each of the N tokens (those of the share).
    """

    share: Annotated[
        float,
        Interval(gt=0, le=1),
        Doc("Of an image's visual tokens, those that the teacher's text attends to most."),
    ] = 1.0
    weighed: Annotated[bool, Doc("Weigh them by how much it attends to each, not equally.")] = False
    looked_at_by: Annotated[
        LookedAtBy, Doc("That text: the answers of the record, or all else in it, as its questions.")
    ] = "answers"
    first: Annotated[
        float, Interval(ge=0, le=1), Doc("That attention: layers from this share of the teacher's depth.")
    ] = 0.3
    last: Annotated[float, Interval(ge=0, le=1), Doc("To below this share of it.")] = 0.7

    label: ClassVar[str] = "visual tokens, against the teacher; nats a token"
    paper: ClassVar[str] = "LLaVA-KD, arXiv 2410.16236, L_vis"
    denominator: ClassVar[Denominator] = VISUAL_TOKENS
    place: ClassVar[Place] = "visual"

    def __post_init__(self) -> None:
        if not self.first < self.last:
            raise ValueError(
                f"`objective.visual_kl.first` ({self.first:g}) must be less than `last` ({self.last:g})"
            )
        if self.looked_at_by != "answers" and self.share == 1 and not self.weighed:
            raise ValueError(
                f"`objective.visual_kl.looked_at_by` {self.looked_at_by} says whose attention chooses or "
                "weighs tokens, and neither is set; set weighed to true or share below 1, or leave it out"
            )

    @property
    def reads(self) -> Reads:
        if self.share == 1 and not self.weighed:
            return super().reads
        return replace(super().reads, teacher="model", attended=(self.first, self.last, self.looked_at_by))

    def head_request(self) -> HeadRequest:
        return replace(super().head_request(), share=self.share, weighed=self.weighed)
