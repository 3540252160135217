"""Minus the conditional mutual information of answers and their input, given the labels; on response rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt
from torch import Tensor
from typing_extensions import Doc

from llava_kd.distill.terms.seen import Seen
from llava_kd.distill.terms.term import Reads, Term


@dataclass(frozen=True, kw_only=True)
class MCMI(Term):
    """Beside `cross_entropy`. A row whose label has no centroid adds 0, and is counted."""

    weight: Annotated[float, Ge(0), Doc("Lambda: it is subtracted this many times.")] = 1.0
    temperature: Annotated[float, Gt(0), Doc("Temperature of the later distillation.")] = 4.0
    clamp: Annotated[
        float, Gt(0), Doc("Nats; a row counts for at most this, and is then pushed no further.")
    ] = 1.0
    margin: Annotated[
        float, Gt(0), Doc("Nats; cross-entropy this far above that of the model before stops the run.")
    ] = 0.5
    centroids: Annotated[
        str | None, Doc("File that `llava-kd data centroids` wrote of this model and these data.")
    ] = None

    label: ClassVar[str] = (
        "minus conditional mutual information, of answers and their input given the label; nats a token"
    )
    paper: ClassVar[str] = "MCMI, arXiv 2401.08732"
    goes_below_zero: ClassVar[bool] = True

    @property
    def reads(self) -> Reads:
        return Reads(places=("response",), centroids=True, labels=True)

    def total(self, seen: Seen) -> Tensor:
        states_ND, labels_N = seen.labelled_states()
        head = seen.student_head
        found = seen.formulas.conditional_information(
            states_ND,
            head.head_VD,
            labels_N,
            seen.centroids,
            temperature=self.temperature,
            clamp=self.clamp,
            bias_V=head.bias_V,
            cap=head.cap,
        )
        return -found.loss
