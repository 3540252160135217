"""What both KL terms share: T^2 times a divergence between teacher and student over the common vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt, Interval
from typing_extensions import Doc

from llava_kd.distill.rows import Place
from llava_kd.distill.terms.term import HeadRequest, Reads, Term
from llava_kd.losses.divergence import WHOLE_KINDS, Divergence, Kind, Temperature


@dataclass(frozen=True, kw_only=True)
class KL(Term):
    temperature: Annotated[
        Temperature,
        Gt(0),
        Doc("Logits are divided by it; `std` divides each side's by their own deviation, row by row."),
    ] = 1.0
    divergence: Annotated[Kind, Doc("Distance between the two softmaxes.")] = "forward"
    mix: Annotated[
        float,
        Interval(gt=0, lt=1),
        Doc(
            "Beta of `jsd`, alpha of the skewed forms, reverse share of `symmetric`, head mass of `adaptive`."
        ),
    ] = 0.5

    place: ClassVar[Place]

    @property
    def reads(self) -> Reads:
        teacher = "states" if self.divergence in WHOLE_KINDS else "logits"  # a cache's largest are too few
        return Reads(teacher=teacher, places=(self.place,), vocabulary=True, grids=self.place == "visual")

    def head_request(self) -> HeadRequest:
        return HeadRequest(
            place=self.place,
            temperature=self.temperature,
            divergence=Divergence(self.divergence, self.mix),
        )
