"""Differentiable changes of pictures: a move, a size, a turn, a crop, colours and blur, by numbers of each.

Shape legend: I images, C channels, H height, W width, K numbers of an image, T taps of a kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

NUMBERS = 11  # of an image: 2 to move, 1 of size, 1 to turn, 3 to crop, 3 of colour, 1 of blur


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """How pixels were normalised, channel by channel: (value - mean) / std of values from 0 to 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Warps:
    """How far each change may go; 0 leaves it out.

    `translate`: as a share of the side. `scale`: as a factor, from 1 / (1 + scale) to 1 + scale. `rotate`:
    in degrees. `crop`: the share of the side that may be cut off. `colour`: how far brightness (of values
    from 0 to 1), contrast and saturation go. `blur`: standard deviation in pixels of the first side.
    """

    translate: float = 0.0
    scale: float = 0.0
    rotate: float = 0.0
    crop: float = 0.0
    colour: float = 0.0
    blur: float = 0.0

    def __call__(self, pixels_ICHW: Tensor, numbers_IK: Tensor, pixels: Pixels) -> Tensor:
        """Changed pixels; gradient flows to the numbers. Numbers lie in [-1, 1], and 0 changes nothing.

        What comes in from outside the picture is the mean colour, 0 of normalised pixels.
        """
        changed_ICHW, numbers_IK = pixels_ICHW.float(), numbers_IK.float()
        if self.blur > 0:
            changed_ICHW = blurred(changed_ICHW, self.blur * numbers_IK[:, 10] ** 2, self.blur)
        if self.colour > 0:
            changed_ICHW = coloured(changed_ICHW, self.colour * numbers_IK[:, 7:10], pixels)
        if max(self.translate, self.scale, self.rotate, self.crop) > 0:
            changed_ICHW = self._moved(changed_ICHW, numbers_IK)
        return changed_ICHW.to(pixels_ICHW.dtype)

    def _moved(self, pixels_ICHW: Tensor, numbers_IK: Tensor) -> Tensor:
        """By one bilinear reading of the picture, so that several changes blur it once."""
        height, width = pixels_ICHW.shape[2:]
        grid_HW2 = _places(height, width, pixels_ICHW)
        # Coordinates of the result run from -1 to 1; those of the picture that is read are looked for.
        moved_I2 = 2 * self.translate * numbers_IK[:, 0:2]
        at_IHW2 = grid_HW2 - moved_I2.view(-1, 1, 1, 2)
        shorter = at_IHW2.new_tensor([width, height]) / min(height, width)
        at_IHW2 = at_IHW2 * shorter  # a turn keeps shapes only where both axes have one unit
        size_I = torch.exp(math.log1p(self.scale) * numbers_IK[:, 2])
        turn_I = math.radians(self.rotate) * numbers_IK[:, 3]
        cos_I11, sin_I11 = ((f(turn_I) / size_I).view(-1, 1, 1) for f in (torch.cos, torch.sin))
        x_IHW, y_IHW = at_IHW2.unbind(3)
        at_IHW2 = torch.stack([cos_I11 * x_IHW + sin_I11 * y_IHW, cos_I11 * y_IHW - sin_I11 * x_IHW], 3)
        at_IHW2 = at_IHW2 / shorter
        cut_I1 = self.crop * numbers_IK[:, 4:5] ** 2
        window_I2 = cut_I1 * numbers_IK[:, 5:7]  # stays inside the picture
        at_IHW2 = at_IHW2 * (1 - cut_I1).view(-1, 1, 1, 1) + window_I2.view(-1, 1, 1, 2)
        return functional.grid_sample(pixels_ICHW, at_IHW2, mode="bilinear", align_corners=False)


def _places(height: int, width: int, like: Tensor) -> Tensor:
    """[H, W, 2]: x and y of each pixel's middle, where the picture's edges are -1 and 1."""
    y_H, x_W = (
        (torch.arange(n, device=like.device, dtype=like.dtype) * 2 + 1) / n - 1 for n in (height, width)
    )
    return torch.stack([x_W.expand(height, width), y_H.unsqueeze(1).expand(height, width)], 2)


def coloured(pixels_ICHW: Tensor, changes_I3: Tensor, pixels: Pixels) -> Tensor:
    """Brightness, contrast and saturation, of pixels that stay those of a picture."""
    mean_C11, std_C11 = (pixels_ICHW.new_tensor(v).view(-1, 1, 1) for v in (pixels.mean, pixels.std))
    brightness, contrast, saturation = (c.view(-1, 1, 1, 1) for c in changes_I3.unbind(1))
    shown_ICHW = pixels_ICHW * std_C11 + mean_C11
    middle_I111 = shown_ICHW.mean((1, 2, 3), keepdim=True)
    shown_ICHW = middle_I111 + (shown_ICHW - middle_I111) * (1 + contrast)
    grey_I1HW = shown_ICHW.mean(1, keepdim=True)
    shown_ICHW = grey_I1HW + (shown_ICHW - grey_I1HW) * (1 + saturation)
    return ((shown_ICHW + brightness).clamp(0, 1) - mean_C11) / std_C11


def blurred(pixels_ICHW: Tensor, deviation_I: Tensor, most: float) -> Tensor:
    """Each picture by a Gaussian of its own, in both directions; the border is repeated outwards."""
    images, channels, height, width = pixels_ICHW.shape
    reach = min(math.ceil(3 * most), height - 1, width - 1)
    offset_T = torch.arange(-reach, reach + 1, device=pixels_ICHW.device, dtype=pixels_ICHW.dtype)
    variance_I1 = deviation_I.unsqueeze(1) ** 2 + 1e-4  # a hundredth of a pixel is no blur
    kernel_IT = (-(offset_T**2) / (2 * variance_I1)).softmax(1)
    kernel_N1T = kernel_IT.repeat_interleave(channels, 0).unsqueeze(1)
    flat_1NHW = pixels_ICHW.reshape(1, images * channels, height, width)
    padded = functional.pad(flat_1NHW, (reach,) * 4, mode="replicate")
    across = functional.conv2d(padded, kernel_N1T.unsqueeze(2), groups=images * channels)
    down = functional.conv2d(across, kernel_N1T.unsqueeze(3), groups=images * channels)
    return down.view_as(pixels_ICHW)
