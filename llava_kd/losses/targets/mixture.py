"""Soft targets of several teachers, mixed where their probabilities are, and how much each of them counts.

With z_m the logits of teacher m over the common columns, T the temperature of the divergence and w_m a row's
weights, which sum to 1, the row's target is

    q = sum_m w_m softmax(z_m / T)

KnFu (arXiv 2403.11892) weighs a teacher by how alike the answers are that it and the learner know:

    w = softmax_m(-beta KL(h || h_m)),    KL(h || g) = sum_k h_k log(h_k / g_k)

with h a histogram of the learner's answer types and h_m of the teacher's. What a histogram is of, and that
each type is counted once more than it was seen, so that the KL is finite, is ours; so are the weights of a
record by agreement, softmax_m(beta * mean over its labels of log p_m(label)).

Shape legend: N rows, C rows of a chunk, P rows of a part of it, U rows of a head, V common columns, E teacher
width, M teachers, K types, R records.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llava_kd.losses.head_loss import by_chunk
from llava_kd.losses.reference import accumulation_dtype

_COPIES = 4  # of a chunk's logits: as they come, softened, their softmax, the sum


class Voice(NamedTuple):
    """A teacher's final hidden states, head and its cap; widths, and rows of the heads, may differ."""

    hidden_NE: Tensor
    head_UE: Tensor
    bias_U: Tensor | None = None
    cap: float | None = None

    def by_chunk(
        self, rows_N: Tensor, of_chunk: Callable[[Tensor, Tensor], tuple[Tensor, ...]], *, copies: int
    ) -> tuple[Tensor, ...]:
        """`by_chunk` of some of its rows."""
        hidden_NE, head_UE, bias_U, cap = self
        return by_chunk(hidden_NE[rows_N], head_UE, bias_U, of_chunk, cap=cap, copies=copies)


@dataclass(frozen=True, kw_only=True)
class MixedTarget:
    """Changes the first teacher's logits so that softmax(logits / `temperature`) is the target.

    `others` are the teachers after the first, at the same N rows. `log_weights_NM` are of all, the first's
    first. To be given to a head loss as its `teacher_change`. Columns beyond the common ones become -inf.
    """

    others: tuple[Voice, ...]
    log_weights_NM: Tensor
    temperature: float
    num_common: int

    def __post_init__(self) -> None:
        if self.log_weights_NM.shape[1] != 1 + len(self.others):
            raise ValueError(
                f"each teacher needs a weight; there are {1 + len(self.others)} teachers and "
                f"{self.log_weights_NM.shape[1]} weights"
            )

    @torch.no_grad()
    def __call__(self, index_C: Tensor, logits_CU: Tensor) -> None:
        """In place, of the rows `index_C`: T log q."""
        mixed_CV = self._share(logits_CU, index_C, 0)
        for m, voice in enumerate(self.others, 1):

            def join(index_P: Tensor, logits_PU: Tensor, m: int = m) -> tuple[Tensor]:
                share_PV = self._share(logits_PU, index_C[index_P], m)
                mixed_CV[index_P] = torch.logaddexp(mixed_CV[index_P], share_PV)
                return (index_P,)

            voice.by_chunk(index_C, join, copies=_COPIES)
        logits_CU[:, : self.num_common] = mixed_CV.mul_(self.temperature)
        logits_CU[:, self.num_common :] = -torch.inf

    def _share(self, logits_PU: Tensor, index_P: Tensor, m: int) -> Tensor:
        """log(w_m softmax(z_m / T)), [P, V]."""
        logits_PV = logits_PU[:, : self.num_common].to(accumulation_dtype(logits_PU))
        share_PV = (logits_PV / self.temperature).log_softmax(1)
        return share_PV.add_(self.log_weights_NM[index_P, m].to(share_PV.dtype).unsqueeze(1))


def histograms(counts: Sequence[Sequence[int]]) -> Tensor:
    """[M, K] fp64 of counts of the same K types; each row sums to 1, none is 0."""
    counts_MK = torch.tensor(counts, dtype=torch.float64) + 1
    return counts_MK / counts_MK.sum(1, keepdim=True)


def log_fusion_weights(own_K: Tensor, theirs_MK: Tensor, *, beta: float) -> Tensor:
    """KnFu's log weights [M], from histograms without zeros."""
    kl_M = (own_K * (own_K.log() - theirs_MK.log())).sum(1)
    return (-beta * kl_M).log_softmax(0)


def log_agreement(likelihood_NM: Tensor, record_N: Tensor, num_records: int, *, beta: float) -> Tensor:
    """Log weights [R, M] of each record, from the log-likelihood of each label and the record that it is of.

    A record without a label has equal weights.
    """
    sums_RM = likelihood_NM.new_zeros(num_records, likelihood_NM.shape[1]).index_add_(
        0, record_N, likelihood_NM
    )
    labels_R = torch.zeros_like(sums_RM[:, 0]).index_add_(0, record_N, torch.ones_like(likelihood_NM[:, 0]))
    return (beta * sums_RM / labels_R.clamp_min(1).unsqueeze(1)).log_softmax(1)
