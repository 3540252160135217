"""Weights of loss terms that are learned, as log-variances s.

Beside the terms whose weight stays, a term of mean L and weight w costs

    w exp(-s) L + c s

Up to its parameters this is Kendall et al. (arXiv 1705.07115), and Beta-KD (arXiv 2603.21426) with
beta = w exp(-s) and d / 2 = c: beta L - (d / 2) log beta, without the constant. At s = 0 it is the fixed
weight. In s alone it is least where w exp(-s) L = c: every term then counts as much as the others.

s = log(most) tanh(p / log(most)) keeps the factor exp(-s) within 1 / most and most, or a term that can be
brought to zero would grow without end. p has GRADIENT_SCALE of its gradient: AdamW steps as far with any
scale, and the norm that gradients are clipped by stays the student's.

Shape legend: K terms.
"""

from __future__ import annotations

import math

from torch import Tensor

GRADIENT_SCALE = 1e-3


def log_variances(free_K: Tensor, most: float) -> Tensor:
    """s from its unbounded form p, fp32 or wider, with a scaled gradient."""
    limit = math.log(most)
    s_K = limit * (free_K.float() if free_K.itemsize < 4 else free_K).div(limit).tanh()
    fixed_K = s_K.detach()
    return fixed_K + GRADIENT_SCALE * (s_K - fixed_K)


def learned_loss(s_K: Tensor, weighted_K: Tensor, share_K: Tensor, *, strength: float) -> Tensor:
    """What learning s adds to a loss that has the sum of w exp(-s) L already, without a gradient to s.

    In value the c s alone; in gradient to s the whole. Of a part of a step: `weighted_K` is w L, the
    part's share of the means, and `share_K` its share of the rows that they are taken over.
    """
    factor_K = (-s_K).exp()
    to_s = (weighted_K.detach() * (factor_K - factor_K.detach())).sum()
    return to_s + strength * (s_K * share_K).sum()
