"""A cap of the logits where they lie, c tanh(z / c), and what it makes of their gradient.

Applied to a chunk of logits before any row kernel reads it, so that none of them, on any device, need know.

Shape legend: C rows of a chunk, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cap_(logits_CV: Tensor, cap: float | None) -> Tensor:
    """In place; what is infinite becomes NaN, for its cap would be finite. As they are without a cap."""
    if cap is None:
        return logits_CV
    logits_CV.masked_fill_(logits_CV.isinf(), torch.nan)
    return logits_CV.div_(cap).tanh_().mul_(cap)


def through_cap_(gradient_CV: Tensor, capped_CV: Tensor, cap: float | None) -> Tensor:
    """From the gradient of capped logits to that of the logits before, 1 - (z / c)^2 times it, in place.

    The capped logits are used up.
    """
    if cap is None:
        return gradient_CV
    return gradient_CV.mul_(capped_CV.div_(cap).square_().neg_().add_(1))
