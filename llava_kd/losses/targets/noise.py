"""Random distributions over a vocabulary that a row's key alone decides, on any device and in any batch.

A counter-based generator: the number of column v of a row with key k is a hash of (k, v), so that rows may be
cut into micro-batches, packed and spread over ranks in any way, and a run that goes on draws what it would
have drawn. Uniform numbers u become -log(u), and these over their sum are uniform over all distributions
(Dirichlet with every parameter 1).

Shape legend: R rows, V columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_FACTOR = 0x45D9F3B  # below 2^31: a product of 32 bits and it fits into 63


def mixed(x: Tensor) -> Tensor:
    """A hash of whole numbers in 0..2^32 - 1, one to one; int64 in and out."""
    x = x & _MASK
    for _ in range(2):
        x = ((x ^ (x >> 16)) * _FACTOR) & _MASK
    return x ^ (x >> 16)


def uniform(key_R: Tensor, num_columns: int) -> Tensor:
    """[R, V] fp32, strictly between 0 and 1; keys are int64, 0 or more."""
    columns_V = mixed(torch.arange(num_columns, device=key_R.device))
    low_RV = mixed(columns_V + (key_R & _MASK).unsqueeze(1))
    hashed_RV = mixed(low_RV ^ (key_R >> 32).unsqueeze(1))
    return ((hashed_RV >> 9).float() + 0.5) * 2.0**-23


def random_distributions(key_R: Tensor, num_columns: int) -> Tensor:
    """[R, V] fp32; each row sums to 1."""
    drawn_RV = -uniform(key_R, num_columns).log()
    return drawn_RV / drawn_RV.sum(1, keepdim=True)
