"""What both terms of Switch-KD share: differences of logits among each side's own largest.

Shape legend: N rows, D and E widths of who learns and who teaches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt
from torch import Tensor
from typing_extensions import Doc

from llava_kd.distill.terms.seen import Head, Seen
from llava_kd.distill.terms.term import Term


@dataclass(frozen=True, kw_only=True)
class DBiLD(Term):
    temperature: Annotated[float, Gt(0), Doc("Differences of logits are divided by it.")] = 3.0
    candidates: Annotated[int, Ge(4), Doc("How many of the largest logits are searched for the knee.")] = 64

    paper: ClassVar[str] = "Switch-KD, arXiv 2604.14629"

    def difference(self, seen: Seen, states: tuple[Tensor, Tensor], heads: tuple[Head, Head]) -> Tensor:
        """Summed over the rows: who learns [N, D], who teaches [N, E]."""
        student_ND, teacher_NE = states
        student, teacher = heads
        result = seen.formulas.dbild_loss(
            student_ND,
            student.head_VD,
            teacher_NE,
            teacher.head_VD,
            student_bias_V=student.bias_V,
            teacher_bias_U=teacher.bias_V,
            temperature=self.temperature,
            candidates=self.candidates,
            num_common=seen.num_common,
            student_cap=student.cap,
            teacher_cap=teacher.cap,
        )
        return result.loss
