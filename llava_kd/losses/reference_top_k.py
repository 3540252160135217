"""The head loss against a teacher whose k largest logits were kept, in plain PyTorch: the oracle of top_k.py.

With z / T and the softmax over the common columns as in reference.py, the divergence is between k + 1 masses:
those of the teacher's k largest columns, and one bucket for all the others, on both sides. Forward, that is

    T^2 ( sum over the k columns of p_t(v) log(p_t(v) / p_s(v))  +  p_t(rest) log(p_t(rest) / p_s(rest)) )

and the others likewise; of `total_variation` the bucket's part is |p_t(rest) - p_s(rest)| / 2. It is never
more than that of all columns, since merging columns loses what tells them apart, and equal to it where one
column is left out. For `total_variation` it is at most min(p_t(rest), p_s(rest)) less. `adaptive` is refused:
it weighs the gaps of the tail one by one, which the bucket hides, and so would lean to the forward side.

At the temperature `std` the teacher's deviation is of all common columns, as it was kept with the logits.

Shape legend: N rows, V student vocabulary, C common columns, D student width, K kept columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llava_kd.losses.checks import check_softening_of_top_k, check_top_k
from llava_kd.losses.divergence import (
    FORWARD,
    Divergence,
    Temperature,
    divergence_rows,
    softened,
    squared,
)
from llava_kd.losses.reference import HeadLoss, accumulation_dtype, head_logits, head_loss


@dataclass(frozen=True, kw_only=True)
class TopK:
    """What was kept of a teacher: the largest logits, their columns, log(sum(exp(z / T))) of the others.

    `std_N`, at the temperature `std` alone: the standard deviation of all the logits, which T is in `rest_N`.
    """

    logits_NK: Tensor
    columns_NK: Tensor
    rest_N: Tensor
    std_N: Tensor | None = None

    def __getitem__(self, rows: Tensor) -> TopK:
        return TopK(
            logits_NK=self.logits_NK[rows],
            columns_NK=self.columns_NK[rows],
            rest_N=self.rest_N[rows],
            std_N=None if self.std_N is None else self.std_N[rows],
        )

    def softened(self, temperature: Temperature, dtype: torch.dtype) -> Tensor:
        """The largest logits at the temperature that `rest_N` is of, [N, K]."""
        if isinstance(temperature, str):
            assert self.std_N is not None
            return self.logits_NK.to(dtype) / self.std_N.to(dtype).unsqueeze(1)
        return self.logits_NK.to(dtype) / temperature


def top_k_head_loss(
    student_ND: Tensor,
    student_head_VD: Tensor,
    targets_N: Tensor,
    *,
    ce_weight_N: Tensor,
    top: TopK,
    kl_weight_N: Tensor,
    num_common: int,
    student_bias_V: Tensor | None = None,
    temperature: Temperature = 1.0,
    divergence: Divergence = FORWARD,
    student_cap: float | None = None,
) -> HeadLoss:
    """`head_loss`, its divergence between k + 1 masses; `top` is of the first `num_common` columns."""
    check_top_k(student_ND, student_head_VD, top.logits_NK, top.columns_NK, top.rest_N, num_common)
    check_softening_of_top_k(temperature, divergence, top.std_N, len(student_ND))
    hard = head_loss(
        student_ND, student_head_VD, targets_N, ce_weight_N=ce_weight_N, student_bias_V=student_bias_V,
        student_cap=student_cap,
    )  # fmt: skip
    with torch.autocast(student_ND.device.type, enabled=False):
        dtype = accumulation_dtype(student_ND)
        rows = kl_weight_N.nonzero().squeeze(1)
        kept = top[rows]
        columns_NK = kept.columns_NK.long()
        logits_NV = head_logits(student_ND[rows], student_head_VD, student_bias_V, student_cap)
        logits_NC = softened(logits_NV[:, :num_common], temperature)
        rest_N = logits_NC.scatter(1, columns_NK, -torch.inf).logsumexp(1)
        kl = squared(temperature) * divergence_rows(
            _with_rest(logits_NC.gather(1, columns_NK), rest_N),
            _with_rest(kept.softened(temperature, dtype), kept.rest_N.to(dtype)),
            divergence,
        )
        kl_N = torch.zeros_like(kl_weight_N, dtype=dtype).index_put((rows,), kl)
        loss = hard.loss + (kl_weight_N * kl_N).sum()
    return HeadLoss(loss=loss, ce_N=hard.ce_N, kl_N=kl_N.detach())


def _with_rest(logits_NK: Tensor, rest_N: Tensor) -> Tensor:
    """Log masses of k columns and of all the others together."""
    return torch.cat([logits_NK, rest_N.unsqueeze(1)], 1).log_softmax(1)
