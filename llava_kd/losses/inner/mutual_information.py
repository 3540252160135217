"""A lower bound of the mutual information between paired rows, from scores of a critic.

Of K pairs (x_i, y_i), scores f(x_i, y_j) and a baseline q(y), the bound of Poole et al. (arXiv 1905.06922)
between InfoNCE and TUBA, which Distiller (arXiv 2109.11105) maximises between inner states as MI-alpha, is

    I_alpha = 1 + E[log(e^f(x, y) / d(y))] - E'[e^f(x, y) / d(y)],
    d(y) = alpha m(y) + (1 - alpha) q(y),  m(y) = mean over x_i of e^f(x_i, y),

with E over pairs and E' over x and y that are no pair. Here, for each y_j, m is the mean over all K of the x
under the first expectation and, as Poole et al. ask for x apart from y, over the K - 1 others under the
second. At alpha = 1 the second is 1 and I is InfoNCE, log K at most; at alpha = 0 there is no m and I is
TUBA, or NWJ where q is e. In between the two means differ by one row of K, and the bound holds up to the
order of 1 / K.

The exponential goes on as its tangent above the exponent `clamp`, which keeps it finite and its gradient
pushing down. A single pair has nothing to be told apart from: its bound is 0.

Shape legend: K pairs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llava_kd.losses.reference import accumulation_dtype


def information_rows(
    scores_KK: Tensor, log_baseline_K: Tensor, *, alpha: float, clamp: float = 10.0
) -> Tensor:
    """[K], in nats, whose mean is the bound. `scores_KK`: f(x_i, y_j) at [i, j]; the baseline: log q(y_j).

    Computed in fp32 or wider. ValueError for scores that are not square or an alpha outside 0..1.
    """
    if scores_KK.ndim != 2 or scores_KK.shape != (len(log_baseline_K),) * 2:
        raise ValueError(
            f"scores must be [pairs, pairs] with a baseline [pairs]; got {list(scores_KK.shape)} and "
            f"{list(log_baseline_K.shape)}"
        )
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 (TUBA) to 1 (InfoNCE); got {alpha}")
    dtype = accumulation_dtype(scores_KK)
    scores_KK, log_baseline_K = scores_KK.to(dtype), log_baseline_K.to(dtype)
    num = len(log_baseline_K)
    if num < 2:
        return 0.0 * (scores_KK.sum(0) + log_baseline_K)
    is_pair_KK = torch.eye(num, dtype=torch.bool, device=scores_KK.device)
    others_KK = scores_KK.masked_fill(is_pair_KK, -torch.inf)
    joint_K = scores_KK.diagonal() - _denominator(scores_KK, num, log_baseline_K, alpha)
    if alpha == 1:
        return joint_K  # the second expectation is 1, whatever the scores are
    against_K = _denominator(others_KK, num - 1, log_baseline_K, alpha)
    ratios_KK = _exp(scores_KK - against_K, clamp).masked_fill(is_pair_KK, 0.0)
    return 1 + joint_K - ratios_KK.sum(0) / (num - 1)


def _denominator(scores_KK: Tensor, num: int, log_baseline_K: Tensor, alpha: float) -> Tensor:
    """log d(y), with m over the `num` scores of each column that are there."""
    if alpha == 0:
        return log_baseline_K
    log_mean_K = scores_KK.logsumexp(0) - math.log(num)
    if alpha == 1:
        return log_mean_K
    return torch.logaddexp(math.log(alpha) + log_mean_K, math.log1p(-alpha) + log_baseline_K)


def _exp(exponent: Tensor, clamp: float) -> Tensor:
    return exponent.clamp_max(clamp).exp() * (1 + (exponent - clamp).clamp_min(0.0))
