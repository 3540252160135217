"""What a model's answers tell of their input beyond the label: the term of MCMI (arXiv 2401.08732).

With p = softmax(z / T) of a row and Q^y the class centroid, the mean of p over all rows whose label is y, the
conditional mutual information I(X; Yhat | Y) is the mean of KL(p || Q^y). A teacher is tuned to minimise
cross-entropy MINUS lambda times it, with centroids computed once, before: the functions here return the
information itself, and the term subtracts it. A row is

    min(KL(p || Q^y), clamp)   in nats, without a factor T^2;   0 where the label has no centroid

The paper has T = 1 and no clamp. The divergence to a fixed centroid has no upper bound, so that a large
lambda leaves the labels behind: a row that has reached the clamp adds no gradient. At T = 1 a model that is
sure of its answers has almost no gradient either; T should be that of the distillation to come. Only labels
with a centroid count, for a centroid of several labels is none of them: I(X; Yhat | Y) would turn into what
tells the labels apart.

Shape legend: N rows, V vocabulary, D width, K labels with a centroid, C rows of a chunk, M rows with a label
that has one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llava_kd.losses.head_loss import by_chunk
from llava_kd.losses.kernels.summed import Side, sum_of_rows
from llava_kd.losses.reference import RowsLoss, accumulation_dtype, head_logits

_CHUNK_ROWS = 64
_COPIES = 3  # of a chunk's logits: as they come, widened, their softmax
NONE = -1


@dataclass(frozen=True, kw_only=True)
class Centroids:
    """log Q^y [K, V] of some labels, and for each token of the vocabulary [V] its row there, or -1."""

    log_q_KV: Tensor
    row_of_V: Tensor

    @staticmethod
    def of(tokens_K: Tensor, centroids_KV: Tensor) -> Centroids:
        """From probabilities; one that fp32 rounded to 0 counts as the least that it holds."""
        row_of_V = row_of_tokens(tokens_K, centroids_KV.shape[1])
        floor = torch.finfo(torch.float32).tiny
        return Centroids(log_q_KV=centroids_KV.float().clamp_min(floor).log(), row_of_V=row_of_V)

    def to(self, device: torch.device) -> Centroids:
        return Centroids(log_q_KV=self.log_q_KV.to(device), row_of_V=self.row_of_V.to(device))


def row_of_tokens(tokens_K: Tensor, num_tokens: int) -> Tensor:
    """[V]: where each token of the vocabulary stands among these, or -1."""
    row_of_V = torch.full((num_tokens,), NONE, dtype=torch.long, device=tokens_K.device)
    row_of_V[tokens_K] = torch.arange(len(tokens_K), device=tokens_K.device)
    return row_of_V


def information_rows(logits_CV: Tensor, log_q_CV: Tensor, *, temperature: float, clamp: float) -> Tensor:
    """[C]: min(KL(softmax(z / T) || Q), clamp)."""
    log_p_CV = (logits_CV / temperature).log_softmax(1)
    return (log_p_CV.exp() * (log_p_CV - log_q_CV)).sum(1).clamp(max=clamp)


def conditional_information(
    hidden_ND: Tensor,
    head_VD: Tensor,
    labels_N: Tensor,
    centroids: Centroids,
    *,
    temperature: float,
    clamp: float,
    bias_V: Tensor | None = None,
    cap: float | None = None,
) -> RowsLoss:
    """The sum of the rows, to be subtracted, and the rows: the plain form, all logits at once.

    Raises ValueError for a temperature or clamp that is not above 0, and for centroids of another head.
    """
    _check(head_VD, centroids, temperature=temperature, clamp=clamp)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        dtype = accumulation_dtype(hidden_ND)
        row_of_N = centroids.row_of_V[labels_N]
        has_centroid_N = row_of_N != NONE
        logits_NV = head_logits(hidden_ND, head_VD, bias_V, cap)
        log_q_MV = centroids.log_q_KV[row_of_N[has_centroid_N]].to(dtype)
        rows_M = information_rows(logits_NV[has_centroid_N], log_q_MV, temperature=temperature, clamp=clamp)
        rows_N = logits_NV.new_zeros(len(labels_N)).index_put((has_centroid_N,), rows_M)
    return RowsLoss(loss=rows_N.sum(), rows_N=rows_N.detach())


def conditional_information_by_chunk(
    hidden_ND: Tensor,
    head_VD: Tensor,
    labels_N: Tensor,
    centroids: Centroids,
    *,
    temperature: float,
    clamp: float,
    bias_V: Tensor | None = None,
    cap: float | None = None,
    chunk_rows: int = _CHUNK_ROWS,
) -> RowsLoss:
    """What `conditional_information` returns; only rows that count go through the head, some at a time."""
    _check(head_VD, centroids, temperature=temperature, clamp=clamp)
    row_of_N = centroids.row_of_V[labels_N]
    has_centroid_N = row_of_N != NONE
    row_of_M = row_of_N[has_centroid_N]

    def rows_of(part: slice, logits_CV: Tensor) -> Tensor:
        log_q_CV = centroids.log_q_KV[row_of_M[part]].to(logits_CV.dtype)
        return information_rows(logits_CV, log_q_CV, temperature=temperature, clamp=clamp)

    side = Side(hidden_ND[has_centroid_N], head_VD, bias_V, cap)
    found = sum_of_rows(side, rows_of, num_columns=head_VD.shape[0], chunk_rows=chunk_rows)
    rows_N = found.rows_N.new_zeros(len(labels_N)).index_put((has_centroid_N,), found.rows_N)
    return RowsLoss(loss=found.loss, rows_N=rows_N)


def add_softmaxes(
    total_KV: Tensor,
    hidden_ND: Tensor,
    head_VD: Tensor,
    row_of_N: Tensor,
    *,
    temperature: float,
    bias_V: Tensor | None = None,
    cap: float | None = None,
) -> Tensor:
    """Add softmax(z / T) of each row to its label's row of the total; `row_of_N` is -1 for what has none.

    The entropies [M] of those that have one: with n rows of a label, the mean of KL(p || Q) over them is the
    entropy of their mean Q less their mean entropy.
    """
    has_centroid_N = row_of_N != NONE
    row_of_M = row_of_N[has_centroid_N]

    def of_chunk(index_C: Tensor, logits_CV: Tensor) -> tuple[Tensor]:
        p_CV = (logits_CV / temperature).softmax(1)
        total_KV.index_add_(0, row_of_M[index_C], p_CV.to(total_KV.dtype))
        return (torch.special.entr(p_CV).sum(1),)

    hidden_MD = hidden_ND[has_centroid_N]
    (entropy_M,) = by_chunk(hidden_MD, head_VD, bias_V, of_chunk, cap=cap, copies=_COPIES)
    return entropy_M


def _check(head_VD: Tensor, centroids: Centroids, *, temperature: float, clamp: float) -> None:
    for name, value in (("temperature", temperature), ("clamp", clamp)):
        if not value > 0:
            raise ValueError(f"the {name} of conditional mutual information must be above 0; got {value}")
    if centroids.log_q_KV.shape[1] != head_VD.shape[0]:
        raise ValueError(
            f"centroids must be over the {head_VD.shape[0]} rows of the head; got "
            f"{centroids.log_q_KV.shape[1]}: they belong to another model"
        )
