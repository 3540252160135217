"""1 - cosine between how the response tokens of a record resemble the visual tokens, one value an image.

Shape legend: I images, P response tokens of a record (fewer are filled up), N visual tokens, D and E width
of student and teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge
from torch import Tensor
from typing_extensions import Doc

from llava_kd.distill.terms.seen import Seen
from llava_kd.distill.terms.term import IMAGES, Denominator, Reads, Term
from llava_kd.losses.text_relation import text_relation_rows


@dataclass(frozen=True, kw_only=True)
class TextRelation(Term):
    weight: Annotated[float, Ge(0), Doc("Factor of this term in the loss.")] = 0.5
    centre: Annotated[bool, Doc("Subtract the mean over an image's visual tokens first.")] = False
    normalise: Annotated[bool, Doc("Scale each token's state to length one first.")] = False
    normalise_rows: Annotated[bool, Doc("Scale each response token's similarities to length one.")] = False

    label: ClassVar[str] = (
        "similarities of response tokens to visual ones, against the teacher; 1 - cosine, a mean over images"
    )
    paper: ClassVar[str] = "the relation of LLaVA-KD, between text and vision as in EM-KD, arXiv 2511.21106"
    denominator: ClassVar[Denominator] = IMAGES

    @property
    def reads(self) -> Reads:
        return Reads(teacher="states", places=("response", "visual"), grids=True)

    def total(self, seen: Seen) -> Tensor:
        student_IPD, teacher_IPE, is_there_IP = seen.answers_of_images()
        student_IND, teacher_INE = seen.features("hidden")
        rows_I = text_relation_rows(
            (student_IPD, student_IND),
            (teacher_IPE, teacher_INE),
            is_there_IP,
            centre=self.centre,
            normalise=self.normalise,
            normalise_rows=self.normalise_rows,
        )
        return (rows_I * seen.is_valid_I).sum()
