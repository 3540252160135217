"""What terms share that compare states of both models, tap by tap."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Self

from annotated_types import MinLen
from torch import Tensor
from typing_extensions import Doc

from llava_kd.distill.rows import Place
from llava_kd.distill.terms.seen import PROJECTOR, Seen
from llava_kd.distill.terms.term import Reads, Term, Widths
from llava_kd.models.taps import Tap


@dataclass(frozen=True, kw_only=True)
class TapPairs(Term):
    """The first tap of the student meets the first of the teacher, and so on; the sum over all pairs."""

    student_taps: Annotated[
        tuple[str, ...],
        MinLen(1),
        Doc("Modules of the student, such as `language_model.layers.3`; `:input` for what goes in."),
    ] = ("language_model",)
    teacher_taps: Annotated[
        tuple[str, ...], MinLen(1), Doc("Modules of the teacher, one for each of the student's.")
    ] = ("language_model",)

    place: ClassVar[Place]

    def __post_init__(self) -> None:
        ours, theirs = self.student_taps, self.teacher_taps
        if len(ours) != len(theirs):
            raise ValueError(
                "`student_taps` and `teacher_taps` are compared pair by pair and must be as many; got "
                f"{len(ours)} ({', '.join(ours)}) and {len(theirs)} ({', '.join(theirs)})"
            )
        for tap in (*ours, *theirs):
            if self.place == "response" and tap.startswith(PROJECTOR):
                raise ValueError(
                    f"the tap {tap!r} shows visual tokens alone, and this term compares response tokens: "
                    "take a path of language_model, or the term of that name that begins with visual_"
                )

    @property
    def reads(self) -> Reads:
        return Reads(
            teacher="model",
            places=(self.place,),
            grids=self.place == "visual",
            student_taps=self.student_taps,
            teacher_taps=self.teacher_taps,
            before_decoder=all(tap.startswith(PROJECTOR) for tap in self.student_taps),
        )

    def mirrored(self) -> Self:
        return replace(self, student_taps=self.teacher_taps, teacher_taps=self.student_taps)

    def widths_of_pairs(self, widths: Widths) -> list[tuple[int, int]]:
        """Of student and teacher. ValueError for a tap that shows no states."""
        return [
            (width_of(ours, widths.student_taps), width_of(theirs, widths.teacher_taps))
            for ours, theirs in zip(self.student_taps, self.teacher_taps, strict=True)
        ]

    def states_of_pairs(self, seen: Seen) -> list[tuple[Tensor, Tensor]]:
        """[N, D] of the student and [N, E] of the teacher, which may be of other widths in every pair."""
        return [
            (seen.tapped_rows(self.place, ours), seen.teacher_rows(self.place, theirs))
            for ours, theirs in zip(self.student_taps, self.teacher_taps, strict=True)
        ]


def width_of(tap: str, widths: Mapping[str, int]) -> int:
    found = widths.get(str(Tap.parse(tap)))
    if found is None:
        raise ValueError(f"the tap {tap!r} shows no states [batch, token, width]; take another path")
    return found
