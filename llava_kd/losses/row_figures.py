"""What one model says at each row, for the log: its loss there, its doubt, and its first choice.

With p = softmax(z) over all of its columns the loss is -log p[target]; with p over the first `num_common`
columns, those that two models share, the doubt is the entropy -sum(p log p), in nats, and the first choice is
the column of the largest logit, the first of equal ones. Temperature 1, no gradient.

Shape legend: N rows, V vocabulary, D width, C rows of a chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llava_kd.losses.head_loss import by_chunk
from llava_kd.losses.reference import ChangeRows, accumulation_dtype

_COPIES = 4  # of a chunk's logits: as they come, widened, their softmax, what is summed


class RowFigures(NamedTuple):
    """`nll_N` and `entropy_N` in nats, at least fp32; `choice_N` a column."""

    nll_N: Tensor
    entropy_N: Tensor
    choice_N: Tensor


def of_logits(logits_NV: Tensor, targets_N: Tensor, num_common: int | None = None) -> RowFigures:
    """The formulas, on logits that are there already. A target outside the vocabulary makes its loss NaN."""
    wide_NV = logits_NV.to(accumulation_dtype(logits_NV))
    num_classes = wide_NV.shape[1]
    is_there_N = (targets_N >= 0) & (targets_N < num_classes)
    target_N1 = targets_N.clamp(0, num_classes - 1).unsqueeze(1)
    nll_N = wide_NV.logsumexp(1) - wide_NV.gather(1, target_N1).squeeze(1)
    common_NV = wide_NV[:, :num_common]
    return RowFigures(
        nll_N=torch.where(is_there_N, nll_N, torch.nan),
        entropy_N=torch.special.entr(common_NV.softmax(1)).sum(1),
        choice_N=common_NV.argmax(1),
    )


def row_figures(
    hidden_ND: Tensor,
    head_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    *,
    num_common: int | None = None,
    cap: float | None = None,
    chunk_rows: int | None = None,
    change: ChangeRows | None = None,
) -> RowFigures:
    """`of_logits` of hidden @ head.T (+ bias), under a cap, a chunk of rows at a time: [N, V] never exists.

    `chunk_rows` overrides the chunk size, which otherwise depends on sizes and the device alone. `change`
    makes the logits others first.
    """

    def of_chunk(index_C: Tensor, logits_CV: Tensor) -> RowFigures:
        if change is not None:
            change(index_C, logits_CV)
        return of_logits(logits_CV, targets_N[index_C], num_common)

    how = {"cap": cap, "copies": _COPIES, "chunk_rows": chunk_rows}
    return RowFigures(*by_chunk(hidden_ND, head_VD, bias_V, of_chunk, **how))
