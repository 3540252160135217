"""Loss terms that no table has, for tests that add them as a user would."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from llava_kd.distill.terms.seen import Seen
from llava_kd.distill.terms.term import VISUAL_TOKENS, Denominator, Reads, Term, Widths


@dataclass(frozen=True, kw_only=True)
class Mapped(Term):
    """1 - cosine between visual states, the student's through a map that is trained with it."""

    label: ClassVar[str] = "visual states through a trained map; 1 - cosine"
    denominator: ClassVar[Denominator] = VISUAL_TOKENS

    @property
    def reads(self) -> Reads:
        return Reads(teacher="states", places=("visual",), grids=True)

    def module(self, widths: Widths) -> nn.Module:
        assert widths.teacher is not None
        return nn.Linear(widths.student, widths.teacher)

    def total(self, seen: Seen) -> Tensor:
        student_IND, teacher_INE = seen.features("hidden")
        rows_IN = 1 - cosine_similarity(seen.module(student_IND), teacher_INE, dim=-1)
        return (rows_IN * seen.is_valid_I.unsqueeze(1)).sum()
