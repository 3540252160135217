"""1 - cosine between the visual tokens' similarity matrices, one value an image.

Shape legend: I images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge
from torch import Tensor
from typing_extensions import Doc

from llava_kd.distill.rows import VisualTap
from llava_kd.distill.terms.seen import Seen
from llava_kd.distill.terms.term import IMAGES, Denominator, Reads, Saturation, Term


@dataclass(frozen=True, kw_only=True)
class Relation(Term):
    weight: Annotated[float, Ge(0), Doc("Factor of this term in the loss.")] = 0.5
    tap: Annotated[VisualTap, Doc("What is compared: LM-head logits, hidden states or projector output.")] = (
        "logits"
    )
    centre: Annotated[bool, Doc("Subtract the mean over an image's tokens first.")] = False
    normalise: Annotated[bool, Doc("Scale each token to length one first.")] = False
    normalise_rows: Annotated[bool, Doc("Scale each token's similarities to the others to length one.")] = (
        False
    )

    label: ClassVar[str] = (
        "similarities between visual tokens, against the teacher; 1 - cosine, a mean over images"
    )
    paper: ClassVar[str] = "LLaVA-KD, arXiv 2410.16236, L_rel"
    denominator: ClassVar[Denominator] = IMAGES

    @property
    def reads(self) -> Reads:
        at_projector = self.tap == "projector"
        return Reads(
            teacher="states",
            places=() if at_projector else ("visual",),
            projector=at_projector,
            grids=True,
            head_gram=self.tap == "logits",
            before_decoder=at_projector,
        )

    def saturation(self) -> Saturation:
        # The authors' own code runs at 0.008 to 0.012 with raw logits, whose matrices share a common part.
        remedy = "compare at another `tap`, or drop it" if self.centre else "set `centre` to true, or drop it"
        return Saturation(below=0.02, remedy=remedy)

    def total(self, seen: Seen) -> Tensor:
        heads = {}
        if self.tap == "logits":
            student, teacher = seen.heads()
            heads = {"student_head_VD": student.head_VD, "teacher_head_UE": teacher.head_VD}
            heads |= {"student_cap": student.cap, "teacher_cap": teacher.cap}
            if teacher.gram_DD is not None:
                heads["teacher_gram_EE"] = teacher.gram_DD
        rows_I = seen.formulas.relation_rows(
            *seen.features(self.tap),
            centre=self.centre,
            normalise=self.normalise,
            normalise_rows=self.normalise_rows,
            **heads,
        )
        return (rows_I * seen.is_valid_I).sum()
