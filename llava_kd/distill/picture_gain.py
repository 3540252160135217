"""What pictures tell a model: its loss on the same answers with other pictures in their places, less its own.

A model that does not look at its pictures loses nothing by the exchange: it may have learned what answers
are usual and no more, and has nothing to teach about what is seen.

Shape legend: B rows, T tokens, I images, N response targets.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llava_kd.batch import Inputs


def with_exchanged_pictures(inputs: Inputs) -> Inputs:
    """Each readable picture in the place of another, half their number further on.

    Neighbours are often records of one picture, so they do not exchange theirs. One picture alone stays.
    """
    valid_N = inputs.places.valid_images_N
    pixels_ICHW = inputs.pixels_ICHW.clone()
    pixels_ICHW[valid_N] = inputs.pixels_ICHW[valid_N.roll(len(valid_N) // 2)]
    return replace(inputs, pixels_ICHW=pixels_ICHW)


def beside_pictures(inputs: Inputs) -> Tensor:
    """Which targets, [N] at `places.response_N`, stand in a row whose picture can be exchanged."""
    if len(inputs.places.valid_images_N) < 2:
        return torch.zeros_like(inputs.places.response_N, dtype=torch.bool)
    has_picture_B = inputs.distilled_visual_BT.any(1)
    return has_picture_B[inputs.places.response_N // inputs.input_ids_BT.shape[1]]
