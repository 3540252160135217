"""Which of two models teaches in each region of a picture (BSD, region-wise, arXiv 2307.12574).

A region is a window of w x w visual tokens of the grid, smaller at its far edges. The paper's pixels have
labels, whose cross-entropy in a region says who teaches there; visual tokens have none, so that what stands
for it comes from the caller, one value a token, less being better.

Shape legend: I images, N tokens of an image, S tokens of a side, K windows of a side.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d


def window_means(values_IN: Tensor, window: int) -> Tensor:
    """[I, N]: of each token, the mean over its window. ValueError for tokens that fill no square."""
    num_images, num_tokens = values_IN.shape
    side = math.isqrt(num_tokens)
    if side * side != num_tokens:
        raise ValueError(
            f"windows of visual tokens need a square grid; an image has {num_tokens} tokens: leave out "
            "visual_regions, or take a tower and a vision_feature_select_strategy that keep the grid alone"
        )
    if num_images == 0:
        return values_IN
    grid_ISS = values_IN.view(num_images, side, side)
    means_IKK = avg_pool2d(grid_ISS, window, ceil_mode=True, count_include_pad=False)
    spread_ISS = means_IKK.repeat_interleave(window, 1).repeat_interleave(window, 2)
    return spread_ISS[:, :side, :side].reshape(num_images, num_tokens)


def taught(student: Tensor, teacher: Tensor, *, reversed_: bool = False) -> Tensor:
    """1 where the teacher's value is below the student's (above it, if reversed), 0 elsewhere, ties too."""
    chosen = teacher > student if reversed_ else teacher < student
    return chosen.to(torch.float32)
