"""How much a teacher needs the picture for each token, and what the token's divergence weighs for it.

With q what the teacher says of a row, q_text what it says of it without the picture, and y the row's label,
at temperature 1 over all of its columns:

    vds = KL(q || q_text)                               VGS, arXiv 2606.00564
    va  = max(0, log q(y) - log q_text(y))              VA-OPD, arXiv 2605.21924

Of a record with n rows the k = ceil(top n) rows of the largest score, as far as it is above 0, weigh
mass n / k each, and at least 1; the others share what is left, so that the weights of a record sum to n. They
depend on nothing but the record, and a step's weights sum to its number of rows, which is known before any
forward. That the share is taken within a record and not over a batch, and that weights are equal within the
top and outside it, is ours: of the papers, notes alone were read.

Shape legend: N rows, C rows of a chunk, P rows of a part of it, U columns, R records.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from llava_kd.losses.head_loss import by_chunk
from llava_kd.losses.reference import accumulation_dtype
from llava_kd.losses.targets.mixture import Voice

_COPIES = 4  # of a chunk's logits: as they come, both log-probabilities, their difference


class Scores(NamedTuple):
    """In nats, at least 0, by their names in the papers."""

    vds_N: Tensor
    va_N: Tensor


@torch.no_grad()
def scores(seen: Voice, unseen: Voice, labels_N: Tensor, *, chunk_rows: int | None = None) -> Scores:
    """Of two readings by one teacher, with the picture and without it: [N, U] logits never exist.

    `chunk_rows` overrides the chunk size, which otherwise depends on sizes and the device alone.
    """

    def of_chunk(index_C: Tensor, seen_CU: Tensor) -> Scores:
        def of_part(index_P: Tensor, unseen_PU: Tensor) -> Scores:
            return of_logits(seen_CU[index_P], unseen_PU, labels_N[index_C[index_P]])

        return Scores(*rows_of(Voice(unseen.hidden_NE[index_C], *unseen[1:]), of_part))

    def rows_of(voice: Voice, ask: Callable[[Tensor, Tensor], Scores]) -> tuple[Tensor, ...]:
        hidden_NE, head_UE, bias_U, cap = voice
        return by_chunk(hidden_NE, head_UE, bias_U, ask, cap=cap, copies=_COPIES, chunk_rows=chunk_rows)

    return Scores(*rows_of(seen, of_chunk))


def of_logits(seen_NU: Tensor, unseen_NU: Tensor, labels_N: Tensor) -> Scores:
    """The formulas. A label outside the columns makes its `va` NaN."""
    num_columns = seen_NU.shape[1]
    log_q_NU, log_text_NU = (
        logits_NU.to(accumulation_dtype(logits_NU)).log_softmax(1) for logits_NU in (seen_NU, unseen_NU)
    )
    gain_NU = log_q_NU - log_text_NU
    is_there_N = (labels_N >= 0) & (labels_N < num_columns)
    va_N = gain_NU.gather(1, labels_N.clamp(0, num_columns - 1).unsqueeze(1)).squeeze(1)
    return Scores(
        vds_N=(log_q_NU.exp() * gain_NU).sum(1).clamp_min(0),
        va_N=torch.where(is_there_N, va_N.clamp_min(0), torch.nan),
    )


def weights(
    score_N: Tensor, record_N: Tensor, is_counted_N: Tensor, num_records: int, *, top: float, mass: float
) -> Tensor:
    """[N], at least fp32. `record_N`: the number of each row's record, below `num_records`.

    Rows that are not counted weigh 1 and are no part of n, as those of a record without a picture. Of equal
    scores the first row comes first. A score that is not a number makes the weight none.
    """
    dtype = accumulation_dtype(score_N)
    score_N = torch.where(is_counted_N, score_N.to(dtype), 0)
    counted_N = is_counted_N.double()
    ones_N, zeros_R = torch.ones_like(counted_N), counted_N.new_zeros(num_records)
    all_R, n_R = (zeros_R.index_add(0, record_N, each_N) for each_N in (ones_N, counted_N))
    k_R = (top * n_R - 1e-9).ceil().clamp_min(1)

    # Stable, so that ties fall alike on every device.
    order_N = score_N.sort(descending=True, stable=True).indices
    order_N = order_N[record_N[order_N].sort(stable=True).indices]
    first_R = all_R.cumsum(0) - all_R
    place_N = torch.arange(len(order_N), device=order_N.device) - first_R[record_N[order_N]]
    rank_N = torch.empty_like(place_N).index_copy(0, order_N, place_N)

    is_top_N = (score_N > 0) & (rank_N < k_R[record_N])
    num_top_R = zeros_R.index_add(0, record_N, is_top_N.double())
    heavy_R = (mass * n_R / k_R).clamp_min(1)
    light_R = (n_R - num_top_R * heavy_R) / (n_R - num_top_R).clamp_min(1)
    weight_N = torch.where(is_top_N, heavy_R[record_N], light_R[record_N])
    return torch.where(is_counted_N, weight_N, 1).to(dtype) + 0 * score_N
