"""A fixed linear map from one language model's embedding space to another's.

Shape legend: C tokens that both models have, D and E their widths.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK_ROWS = 16384
_RIDGE = 1e-6  # share of the mean square of a coordinate


@torch.no_grad()
def width_map(source_CD: Tensor, target_CE: Tensor) -> Tensor:
    """[D, E] that best carries the embedding of each token to its embedding there (least squares)."""
    gram_DD = torch.zeros(source_CD.shape[1], source_CD.shape[1], dtype=torch.float64)
    cross_DE = torch.zeros(source_CD.shape[1], target_CE.shape[1], dtype=torch.float64)
    for wide_CD, wide_CE in zip(source_CD.split(_CHUNK_ROWS), target_CE.split(_CHUNK_ROWS), strict=True):
        source, target = wide_CD.cpu().double(), wide_CE.cpu().double()
        gram_DD += source.T @ source
        cross_DE += source.T @ target
    gram_DD.diagonal().add_(_RIDGE * gram_DD.diagonal().mean())
    return torch.linalg.solve(gram_DD, cross_DE).float()
