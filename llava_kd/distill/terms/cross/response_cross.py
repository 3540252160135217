"""The divergence from a teacher whose tokenizer may be another: answers are compared as stretches of text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor
from typing_extensions import Doc

from llava_kd.batch import IGNORE_INDEX, Batch
from llava_kd.distill.terms.seen import Seen
from llava_kd.distill.terms.term import Denominator, Reads, Term
from llava_kd.losses.cross.stretches import Distance
from llava_kd.losses.divergence import Divergence

Form = Literal["pairs", "onto_teacher", "onto_student"]


def _number(batch: Batch) -> Tensor:
    """Of the stretches; where both sides have one tokenizer each response token is one."""
    if batch.stretches is None:
        return (batch.student.targets_BT != IGNORE_INDEX).sum().double()
    first_S = batch.stretches.student.first_S
    return torch.full((), len(first_S), dtype=torch.float64, device=first_S.device)


STRETCHES = Denominator(name="response_stretches", count=_number, by_share=True)


@dataclass(frozen=True, kw_only=True)
class ResponseCross(Term):
    temperature: Annotated[float, Gt(0), Doc("Logits are divided by it, of further tokens too.")] = 1.0
    divergence: Annotated[
        Literal["forward", "reverse", "jsd"], Doc("Distance over the tokens that both sides have.")
    ] = "forward"
    mix: Annotated[float, Interval(gt=0, lt=1), Doc("Beta of `jsd`.")] = 0.5
    form: Annotated[
        Form, Doc("Compare equal tokens, or project all tokens of one side onto the other's vocabulary.")
    ] = "pairs"
    unpaired: Annotated[
        float,
        Ge(0),
        Doc("Factor of the distance of sorted probabilities of tokens that one side lacks; for `pairs`."),
    ] = 1.0
    spread: Annotated[
        float,
        Interval(ge=0, lt=1),
        Doc("Weight of each piece of a projected token relative to the one before; 0: the first only."),
    ] = 0.0

    label: ClassVar[str] = "stretches of the responses, against a teacher of any tokenizer; nats a stretch"
    paper: ClassVar[str] = "GOLD (TRL); ULD, arXiv 2402.12030; X-Token, arXiv 2605.21699"
    denominator: ClassVar[Denominator] = STRETCHES

    @property
    def reads(self) -> Reads:
        return Reads(teacher="states", places=("response",), vocabulary=True, labels=True, stretches=True)

    def total(self, seen: Seen) -> Tensor:
        if seen.words is None:
            return self._of_equal_tokens(seen)
        student, teacher = seen.stretches()
        distance = Distance(temperature=self.temperature, divergence=self._kind, unpaired=self.unpaired)
        if self.form == "pairs":
            found = seen.formulas.stretch_loss(student, teacher, seen.words, distance)
        else:
            found = seen.formulas.projected_loss(student, teacher, seen.projection, distance)
        seen.figures["matched_mass"] = found.paired_S.sum()
        if found.ruled_S is not None:
            seen.figures["projected_mass"] = found.ruled_S.sum()
        return found.loss

    @property
    def _kind(self) -> Divergence:
        return Divergence(self.divergence, self.mix)

    def _of_equal_tokens(self, seen: Seen) -> Tensor:
        """What response_kl sums: every stretch is a token, and every token has its pair."""
        (student_ND, teacher_NE), (student, teacher) = seen.states("response"), seen.heads()
        weight_N = torch.ones(len(student_ND), device=student_ND.device)
        result = seen.formulas.head_loss(
            student_ND,
            student.head_VD,
            seen.targets("response"),
            ce_weight_N=torch.zeros_like(weight_N),
            kl_weight_N=weight_N,
            student_bias_V=student.bias_V,
            teacher_NE=teacher_NE,
            teacher_head_UE=teacher.head_VD,
            teacher_bias_U=teacher.bias_V,
            student_cap=student.cap,
            teacher_cap=teacher.cap,
            temperature=self.temperature,
            divergence=self._kind,
            num_common=seen.num_common,
            active_rows=(len(student_ND), 0),
        )
        return result.loss
