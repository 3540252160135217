"""Loss terms that no table has, for tests that add them as a user would."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from typing_extensions import Doc

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


@dataclass(frozen=True, kw_only=True)
class LayerStates(Term):
    """Squared distance of two layers' states on the response rows, a mean over their widths."""

    student_layer: Annotated[str, Doc("module of the student")] = "language_model.layers.0"
    teacher_layer: Annotated[str, Doc("module of the teacher")] = "language_model.layers.0"

    label: ClassVar[str] = "states between layers; squared distance"

    @property
    def reads(self) -> Reads:
        return Reads(
            teacher="model",
            places=("response",),
            student_taps=(self.student_layer,),
            teacher_taps=(self.teacher_layer,),
        )

    def total(self, seen: Seen) -> Tensor:
        rows = seen.rows("response")
        student_ND = seen.tapped(self.student_layer).flatten(0, 1)[rows.student_N].float()
        teacher_NE = seen.teacher_tapped(self.teacher_layer).flatten(0, 1)[rows.teacher_N].float()
        return (student_ND.mean(1) - teacher_NE.mean(1)).square().sum()


TERMS = {"layer_states": LayerStates, "mapped": Mapped}
