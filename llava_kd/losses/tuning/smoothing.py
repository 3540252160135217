"""What smoothed labels add to cross-entropy (Szegedy et al., arXiv 1512.00567).

With the label's probability lowered to 1 - s + s / V and that of each other token raised to s / V, the
cross-entropy is (1 - s) CE + s mean_v(-log p(v)), so that it is

    CE + s (mean_v(-log p(v)) - CE) = CE + s (z(label) - mean_v z(v))

The normaliser of the softmax cancels: a row is the label's logit above the mean of all V logits.

Shape legend: N rows, V vocabulary, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava_kd.losses.kernels.summed import Side, sum_of_rows
from llava_kd.losses.reference import RowsLoss, accumulation_dtype, head_logits

_CHUNK_ROWS = 64


def smoothing(
    hidden_ND: Tensor,
    head_VD: Tensor,
    labels_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    cap: float | None = None,
) -> RowsLoss:
    """mean_v(-log p(v)) + log p(label), from all log-probabilities."""
    with torch.autocast(hidden_ND.device.type, enabled=False):
        log_p_NV = head_logits(hidden_ND, head_VD, bias_V, cap).log_softmax(1)
        rows_N = log_p_NV.gather(1, labels_N.unsqueeze(1)).squeeze(1) - log_p_NV.mean(1)
    return RowsLoss(loss=rows_N.sum(), rows_N=rows_N.detach())


def smoothing_without_logits(
    hidden_ND: Tensor,
    head_VD: Tensor,
    labels_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    cap: float | None = None,
) -> RowsLoss:
    """The same as hidden . (head(label) - mean of the head): no logits of a vocabulary are made.

    A mean of capped logits is no product: those of a few rows at a time are.
    """
    if cap is not None:
        side = Side(hidden_ND, head_VD, bias_V, cap)

        def rows_of(part: slice, logits_CV: Tensor) -> Tensor:
            return logits_CV.gather(1, labels_N[part].unsqueeze(1)).squeeze(1) - logits_CV.mean(1)

        return sum_of_rows(side, rows_of, num_columns=head_VD.shape[0], chunk_rows=_CHUNK_ROWS)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        dtype = accumulation_dtype(hidden_ND)
        above_ND = head_VD[labels_N].to(dtype) - head_VD.mean(0, dtype=dtype)
        rows_N = (hidden_ND.to(dtype) * above_ND).sum(1)
        if bias_V is not None:
            rows_N = rows_N + bias_V[labels_N].to(dtype) - bias_V.mean(0, dtype=dtype)
    return RowsLoss(loss=rows_N.sum(), rows_N=rows_N.detach())
