"""A teacher's target beside a further one, in which the student's own habit takes the place of the teacher's.

With q and p what teacher and student say of a row, and q_text and p_text what they say of it without the
picture, VGS (arXiv 2606.00564) adds to the divergence of p and q gamma times that of p and

    q* proportional to p_text q / q_text

in which only what the picture adds is the teacher's. p_text has no gradient. Both divergences together are,
up to what has no gradient, 1 + gamma times that of p and one target:

    forward, KL(q || p)    (q + gamma q*) / (1 + gamma)
    reverse, KL(p || q)    proportional to (q q*^gamma)^(1 / (1 + gamma))

Shape legend: N rows, M response rows, C rows of a chunk, R those of them that change, P rows of a part of it,
U rows of a head, E width, V common columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llava_kd.losses.reference import accumulation_dtype
from llava_kd.losses.targets.mixture import Voice

_COPIES = 4  # of a chunk's logits: as they come, both targets, their sum


@dataclass(frozen=True, kw_only=True)
class ContrastTarget:
    """Changes the teacher's logits so that softmax(logits / `temperature`) is the one target.

    `unseen` is the teacher without the picture and `own` the student, at M response rows; `row_N` says which
    of these each row of the call is, below 0 where it stays as it is. To be given to a head loss as its
    `teacher_change`.
    """

    unseen: Voice
    own: Voice
    row_N: Tensor
    gamma: float
    kind: Literal["forward", "reverse"]
    temperature: float
    num_common: int

    @torch.no_grad()
    def __call__(self, index_C: Tensor, logits_CU: Tensor) -> None:
        """In place, of the rows `index_C`; columns beyond the common ones become -inf there."""
        place_R = (self.row_N[index_C] >= 0).nonzero().squeeze(1)
        row_R = self.row_N[index_C[place_R]]
        seen_RV = logits_CU[place_R, : self.num_common].to(accumulation_dtype(logits_CU))
        other_RV = seen_RV.clone()
        for voice, sign in ((self.unseen, -1), (self.own, 1)):

            def add(index_P: Tensor, logits_PU: Tensor, sign: int = sign) -> tuple[Tensor]:
                other_RV[index_P] += sign * logits_PU[:, : self.num_common]
                return (index_P,)

            voice.by_chunk(row_R, add, copies=_COPIES)
        logits_CU[place_R, : self.num_common] = self._together(seen_RV, other_RV).to(logits_CU.dtype)
        logits_CU[place_R, self.num_common :] = -torch.inf

    def _together(self, seen_RV: Tensor, other_RV: Tensor) -> Tensor:
        if self.kind == "reverse":
            return (seen_RV + self.gamma * other_RV) / (1 + self.gamma)
        log_q_RV, log_other_RV = ((z_RV / self.temperature).log_softmax(1) for z_RV in (seen_RV, other_RV))
        both_RV = torch.logaddexp(log_q_RV, log_other_RV + math.log(self.gamma))
        return self.temperature * (both_RV - math.log1p(self.gamma))
