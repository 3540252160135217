"""A fixed linear map from one language model's embedding space to another's.

Shape legend: V and U rows of the embeddings, D and E their widths, C rows that mean the same token.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK_ROWS = 16384
_RIDGE = 1e-6  # share of the mean square of a coordinate


@torch.no_grad()
def width_map(source_VD: Tensor, target_UE: Tensor, num_common: int) -> Tensor:
    """[D, E] that best carries the embedding of each shared token to its embedding there (least squares)."""
    gram_DD = torch.zeros(source_VD.shape[1], source_VD.shape[1], dtype=torch.float64)
    cross_DE = torch.zeros(source_VD.shape[1], target_UE.shape[1], dtype=torch.float64)
    for first in range(0, num_common, _CHUNK_ROWS):
        part = slice(first, min(first + _CHUNK_ROWS, num_common))
        source_CD, target_CE = source_VD[part].cpu().double(), target_UE[part].cpu().double()
        gram_DD += source_CD.T @ source_CD
        cross_DE += source_CD.T @ target_CE
    gram_DD.diagonal().add_(_RIDGE * gram_DD.diagonal().mean())
    return torch.linalg.solve(gram_DD, cross_DE).float()
