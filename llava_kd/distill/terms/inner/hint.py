"""Distance of the student's inner states, mapped where the widths differ, from the teacher's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Doc

from llava_kd.distill.rows import Place
from llava_kd.distill.terms.inner.pairs import TapPairs
from llava_kd.distill.terms.seen import Seen
from llava_kd.distill.terms.term import VISUAL_TOKENS, Denominator, Widths
from llava_kd.losses.inner.hint import Kind, hint_rows


@dataclass(frozen=True, kw_only=True)
class Hint(TapPairs):
    kind: Annotated[Kind, Doc("Mean squared difference over the width, or 1 - cosine.")] = "mse"
    map: Annotated[
        Literal["auto", "always", "never"],
        Doc("A trained linear map of the student's states: where widths differ, always or never."),
    ] = "auto"

    label: ClassVar[str] = "inner states of response tokens, against the teacher's; a sum over pairs of taps"
    paper: ClassVar[str] = "FitNets, arXiv 1412.6550; a choice of Distiller, arXiv 2109.11105"
    place: ClassVar[Place] = "response"

    def module(self, widths: Widths) -> nn.Module | None:
        maps = [self._map(number, *pair) for number, pair in enumerate(self.widths_of_pairs(widths))]
        return nn.ModuleList(maps) if any(isinstance(map_, nn.Linear) for map_ in maps) else None

    def _map(self, number: int, student: int, teacher: int) -> nn.Module:
        if self.map == "never" and student != teacher:
            raise ValueError(
                f"{self.student_taps[number]} of the student is {student} wide and "
                f"{self.teacher_taps[number]} of the teacher {teacher}; set `map` to auto, or tap places of "
                "one width"
            )
        is_mapped = self.map == "always" or student != teacher
        return nn.Linear(student, teacher) if is_mapped else nn.Identity()

    def mapped_pairs(self, seen: Seen) -> list[tuple[Tensor, Tensor]]:
        """[N, E] of both sides in every pair."""
        pairs = self.states_of_pairs(seen)
        if not seen.has_module:
            return pairs
        maps = seen.module
        assert isinstance(maps, nn.ModuleList)
        return [(map_(ours), theirs) for map_, (ours, theirs) in zip(maps, pairs, strict=True)]

    def total(self, seen: Seen) -> Tensor:
        pairs = self.mapped_pairs(seen)
        return torch.stack([hint_rows(ours, theirs, self.kind).sum() for ours, theirs in pairs]).sum()


@dataclass(frozen=True, kw_only=True)
class VisualHint(Hint):
    label: ClassVar[str] = "inner states of visual tokens, against the teacher's; a sum over pairs of taps"
    denominator: ClassVar[Denominator] = VISUAL_TOKENS
    place: ClassVar[Place] = "visual"
