"""What smoothed labels add to cross-entropy, on response rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Interval
from torch import Tensor
from typing_extensions import Doc

from llava_kd.distill.terms.seen import Seen
from llava_kd.distill.terms.term import Reads, Term


@dataclass(frozen=True, kw_only=True)
class LabelSmoothing(Term):
    weight: Annotated[
        float,
        Interval(ge=0, le=1),
        Doc("Probability spread over all tokens, together with `cross_entropy` of 1."),
    ] = 0.1

    label: ClassVar[str] = "what labels smoothed over all tokens add to cross-entropy; nats a token"
    paper: ClassVar[str] = "label smoothing, arXiv 1512.00567"
    goes_below_zero: ClassVar[bool] = True

    @property
    def reads(self) -> Reads:
        return Reads(places=("response",), labels=True)

    def total(self, seen: Seen) -> Tensor:
        states_ND, labels_N = seen.labelled_states()
        head = seen.student_head
        how = {"bias_V": head.bias_V, "cap": head.cap}
        return seen.formulas.smoothing(states_ND, head.head_VD, labels_N, **how).loss
