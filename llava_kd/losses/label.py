"""What a model says of the labels themselves: their probability, and how many tokens have a larger logit.

With p = softmax(z) over the columns that both models share, at temperature 1: p(label), -log p(label), and
the number of columns v with z(v) > z(label). A label that is no common column has probability 0 and comes
after all columns.
To follow a teacher only where its first choice is the label is conditional teacher-student learning (Meng et
al., arXiv 1904.12399), where the label alone is learned elsewhere. Logits that are not numbers count as first
choice, so that what reads them is not a number either.

Shape legend: N rows, V vocabulary, D width, C rows of a chunk, K kept columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llava_kd.losses.head_loss import by_chunk
from llava_kd.losses.reference import head_logits
from llava_kd.losses.reference_top_k import TopK


class LabelRows(NamedTuple):
    """fp32 probabilities of the labels, whether each is its row's first choice, its loss, and how many tokens
    come before it. No gradient.

    `nll_N` tells apart what `probability_N` rounds to 0 or 1; infinite where the probability is 0.
    """

    probability_N: Tensor
    is_first_N: Tensor
    nll_N: Tensor
    before_N: Tensor


@torch.no_grad()
def label_rows(
    hidden_ND: Tensor,
    head_VD: Tensor,
    labels_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    cap: float | None = None,
    num_common: int | None = None,
) -> LabelRows:
    """The plain form: all logits at once, over the first `num_common` columns (default: all)."""
    with torch.autocast(hidden_ND.device.type, enabled=False):
        logits_NV = head_logits(hidden_ND, head_VD, bias_V, cap)
        return _of_logits(logits_NV[:, :num_common], labels_N)


def label_rows_by_chunk(
    hidden_ND: Tensor,
    head_VD: Tensor,
    labels_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    cap: float | None = None,
    num_common: int | None = None,
    chunk_rows: int | None = None,
) -> LabelRows:
    """What `label_rows` returns, in memory that does not grow with rows times vocabulary.

    `chunk_rows` overrides the chunk size, which otherwise depends on sizes and the device alone.
    """

    def of_chunk(index_C: Tensor, logits_CV: Tensor) -> LabelRows:
        return _of_logits(logits_CV[:, :num_common], labels_N[index_C])

    return LabelRows(*by_chunk(hidden_ND, head_VD, bias_V, of_chunk, cap=cap, chunk_rows=chunk_rows))


@torch.no_grad()
def top_k_label_rows(top: TopK, labels_N: Tensor) -> LabelRows:
    """Of the largest logits of a teacher, and of the others' mass at temperature 1.

    Exact where the label is among them; elsewhere it comes after all of them, and its probability, which was
    not kept, counts as 0.
    """
    logits_NK = top.logits_NK.float()
    is_label_NK = top.columns_NK == labels_N.unsqueeze(1)
    label_N = torch.where(is_label_NK, logits_NK, -torch.inf).amax(1)
    mass_N = torch.logaddexp(logits_NK.logsumexp(1), top.rest_N.float())
    is_first_N = is_label_NK.any(1) & ~(label_N < logits_NK.amax(1))
    before_N = (logits_NK > label_N.unsqueeze(1)).sum(1)
    return LabelRows((label_N - mass_N).exp(), is_first_N, mass_N - label_N, before_N)


def _of_logits(logits_CV: Tensor, labels_C: Tensor) -> LabelRows:
    is_common_C = (labels_C >= 0) & (labels_C < logits_CV.shape[1])
    label_C = logits_CV.gather(1, torch.where(is_common_C, labels_C, 0).unsqueeze(1)).squeeze(1)
    nll_C = (logits_CV.logsumexp(1) - label_C).float()
    is_first_C = ~(label_C < logits_CV.amax(1)) & is_common_C
    nll_C = torch.where(is_common_C, nll_C, torch.inf)
    before_C = torch.where(is_common_C, (logits_CV > label_C.unsqueeze(1)).sum(1), logits_CV.shape[1])
    return LabelRows((-nll_C).exp(), is_first_C, nll_C, before_C)
