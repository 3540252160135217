"""What both KL terms share: T^2 times a divergence between teacher and student over the common vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt, Le
from typing_extensions import Doc

from llava_kd.distill.rows import Place
from llava_kd.distill.terms.term import HeadRequest, Reads, Term
from llava_kd.losses.reference import Divergence, Kind


@dataclass(frozen=True, kw_only=True)
class KL(Term):
    temperature: Annotated[float, Gt(0), Doc("both softmaxes are of logits divided by it")] = 1.0
    divergence: Annotated[Kind, Doc("distance between the two softmaxes")] = "forward"
    mix: Annotated[float, Ge(0), Le(1), Doc("beta of `jsd`, alpha of the skewed forms; between 0 and 1")] = (
        0.5
    )

    place: ClassVar[Place]

    def __post_init__(self) -> None:
        if not 0 < self.mix < 1:
            raise ValueError(
                f"`mix` of a KL term must be between 0 and 1, got {self.mix:g}: at the ends, set "
                "divergence to forward or reverse"
            )

    @property
    def reads(self) -> Reads:
        return Reads(teacher="logits", places=(self.place,), vocabulary=True, grids=self.place == "visual")

    def head_request(self) -> HeadRequest:
        return HeadRequest(
            place=self.place,
            temperature=self.temperature,
            divergence=Divergence(self.divergence, self.mix),
        )
