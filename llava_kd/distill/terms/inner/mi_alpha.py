"""The mutual information of inner states of both models, by its lower bound between InfoNCE and TUBA.

Shape legend: N rows, K rows of a group, D and E width of student and teacher, W width of the critic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from typing_extensions import Doc

from llava_kd.distill.rows import Place
from llava_kd.distill.terms.inner.pairs import TapPairs
from llava_kd.distill.terms.seen import Seen
from llava_kd.distill.terms.term import VISUAL_TOKENS, Denominator, Widths
from llava_kd.losses.inner.mutual_information import information_rows


class Critic(nn.Module):
    """Both sides' states as vectors whose scaled product is a score, and log q of the teacher's.

    A state is brought to mean 0 and variance 1 first: a few numbers of a decoder's are hundreds of times the
    others. Without `has_baseline` log q is 0.
    """

    def __init__(self, student: int, teacher: int, width: int, *, has_baseline: bool) -> None:
        super().__init__()
        self.of_student = nn.Linear(student, width)
        self.of_teacher = nn.Linear(teacher, width)
        self.baseline = None
        if has_baseline:
            self.baseline = nn.Sequential(nn.Linear(teacher, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, student_ND: Tensor, teacher_NE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[N, W] twice, the scale being in the first, and [N]; fp32 or wider."""
        dtype = self.of_student.weight.dtype
        student_ND, teacher_NE = (_standard(states.to(dtype)) for states in (student_ND, teacher_NE))
        wide = torch.promote_types(dtype, torch.float32)
        ours_NW = self.of_student(student_ND).to(wide) / math.sqrt(self.of_student.out_features)
        theirs_NW = self.of_teacher(teacher_NE).to(wide)
        if self.baseline is None:
            return ours_NW, theirs_NW, theirs_NW.new_zeros(len(theirs_NW))
        return ours_NW, theirs_NW, self.baseline(teacher_NE).to(wide).squeeze(1)


@dataclass(frozen=True, kw_only=True)
class MIAlpha(TapPairs):
    """Rows are told apart from others of their micro-batch on their rank: its size matters."""

    alpha: Annotated[
        float, Interval(ge=0, le=1), Doc("1 is InfoNCE, steady and at most log of the rows; 0 is TUBA.")
    ] = 0.5
    width: Annotated[int, Gt(0), Doc("Of the vectors that both states are mapped to for the critic.")] = 128
    clamp: Annotated[float, Gt(0), Doc("The exponential is a straight line from this exponent on.")] = 10.0
    most_rows: Annotated[
        int, Ge(2), Doc("Rows of a micro-batch that the critic compares at once; more are split into groups.")
    ] = 1024

    label: ClassVar[str] = "minus a bound on the information of response states about the teacher's; nats"
    paper: ClassVar[str] = "Distiller, arXiv 2109.11105; Poole et al., arXiv 1905.06922"
    place: ClassVar[Place] = "response"
    compares_rows: ClassVar[bool] = True
    goes_below_zero: ClassVar[bool] = True

    def module(self, widths: Widths) -> nn.Module:
        pairs, has_baseline = self.widths_of_pairs(widths), self.alpha < 1
        return nn.ModuleList(Critic(*pair, self.width, has_baseline=has_baseline) for pair in pairs)

    def total(self, seen: Seen) -> Tensor:
        critics = seen.module
        assert isinstance(critics, nn.ModuleList)
        pairs = self.states_of_pairs(seen)
        return -torch.stack([self._information(c(*p)) for c, p in zip(critics, pairs, strict=True)]).sum()

    def _information(self, said: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Summed over the rows, which are dealt out so that neighbours come to different groups."""
        num = len(said[0])
        groups = max(1, math.ceil(num / self.most_rows))
        total = []
        with torch.autocast(said[0].device.type, enabled=False):
            for first in range(groups):
                ours_KW, theirs_KW, log_baseline_K = (tensor[first::groups] for tensor in said)
                scores_KK = ours_KW @ theirs_KW.T
                rows_K = information_rows(scores_KK, log_baseline_K, alpha=self.alpha, clamp=self.clamp)
                total.append(rows_K.sum())
        return torch.stack(total).sum()


@dataclass(frozen=True, kw_only=True)
class VisualMIAlpha(MIAlpha):
    label: ClassVar[str] = "minus a bound on the information of visual states about the teacher's; nats"
    denominator: ClassVar[Denominator] = VISUAL_TOKENS
    place: ClassVar[Place] = "visual"


def _standard(states_ND: Tensor) -> Tensor:
    return layer_norm(states_ND, states_ND.shape[1:])
