"""Pillow's antialiased resize, bit for bit, on the CPU and on a GPU.

Pillow resizes one axis, rounds to uint8, and resizes the other, with weights in 22-bit fixed point. All of
it is exact in float64 matrix products, in whatever order a device adds. The horizontal axis always goes
first, as in every Pillow before 13.0 and so in the training of every published checkpoint; Pillow 13 swaps
the axes for some tall images.

Shape legend: H height, W width, C channels, S input size, T output size, K inputs of an output.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

BILINEAR = int(Image.Resampling.BILINEAR)
BICUBIC = int(Image.Resampling.BICUBIC)
_SUPPORT = {BILINEAR: 1.0, BICUBIC: 2.0}
_FRACTION_BITS = 22
_CUBIC = -0.5


def check_filter(resample: int) -> None:
    """ValueError for a filter number of Pillow's that is not here."""
    if resample not in _SUPPORT:
        raise ValueError(f"resample must be {BILINEAR} (bilinear) or {BICUBIC} (bicubic), got {resample}")


def resize(pixels_HWC: Tensor, size: tuple[int, int], resample: int) -> Tensor:
    """uint8 [*size, C] by Pillow's filter number `resample`."""
    if pixels_HWC.device.type == "cpu":
        return _resize_by_pillow(pixels_HWC, size, resample)
    return resize_by_products(pixels_HWC, size, resample)


def resize_fast(pixels_HWC: Tensor, size: tuple[int, int], resample: int) -> Tensor:
    """The same filter in torch's uint8 kernel of the CPU: far quicker, but some pixels differ by 1 or 2."""
    mode = "bicubic" if resample == BICUBIC else "bilinear"
    image_1CHW = pixels_HWC.permute(2, 0, 1)[None]
    resized_1CHW = torch.nn.functional.interpolate(
        image_1CHW, size=size, mode=mode, antialias=True, align_corners=False
    )
    return resized_1CHW[0].permute(1, 2, 0)


def _resize_by_pillow(pixels_HWC: Tensor, size: tuple[int, int], resample: int) -> Tensor:
    """An axis at a time, so that the order does not depend on Pillow's version."""
    height, width = size
    image = Image.fromarray(pixels_HWC.numpy())
    for step in ((width, image.height), (width, height)):
        if image.size != step:
            image = image.resize(step, Image.Resampling(resample))
    return torch.from_numpy(np.array(image))


def resize_by_products(pixels_HWC: Tensor, size: tuple[int, int], resample: int) -> Tensor:
    """The same in matrix products, on any device."""
    height, width, channels = pixels_HWC.shape
    rows_HCW = pixels_HWC.permute(0, 2, 1)
    if width != size[1]:
        across_TS = _weights(width, size[1], resample, pixels_HWC.device)
        rows_HCW = _rounded(rows_HCW.double().reshape(-1, width) @ across_TS.T)
    rows_HX = rows_HCW.reshape(height, channels * size[1])
    if height != size[0]:
        down_TS = _weights(height, size[0], resample, pixels_HWC.device)
        rows_HX = _rounded(down_TS @ rows_HX.double())
    return rows_HX.reshape(size[0], channels, size[1]).permute(0, 2, 1)


def _rounded(sums: Tensor) -> Tensor:
    return torch.floor(sums * 2.0**-_FRACTION_BITS + 0.5).clamp(0, 255).to(torch.uint8)


def _weights(size_in: int, size_out: int, resample: int, device: torch.device) -> Tensor:
    """float64 [out, in] weights, whole numbers in units of 2^-22."""
    place_TK, weight_TK = _taps_on(device, size_in, size_out, resample)
    weights_TS = torch.zeros(size_out, size_in, dtype=torch.float64, device=device)
    return weights_TS.scatter_add_(1, place_TK, weight_TK)


@lru_cache(maxsize=4096)
def _taps_on(device: torch.device, size_in: int, size_out: int, resample: int) -> tuple[Tensor, Tensor]:
    """`taps`, kept on the device: some kilobytes a size, where the whole matrix has megabytes."""
    place_TK, weight_TK = taps(size_in, size_out, resample)
    return torch.from_numpy(place_TK).to(device), torch.from_numpy(weight_TK).to(device)


def taps(size_in: int, size_out: int, resample: int) -> tuple[np.ndarray, np.ndarray]:
    """The inputs that each output reads, int64 [out, K], and their weights as Pillow rounds them, float64.

    An output that reads fewer than K inputs has weights of zero at the end.
    """
    scale = size_in / size_out
    filter_scale = max(scale, 1.0)
    support = _SUPPORT[resample] * filter_scale
    centres_T1 = (np.arange(size_out)[:, None] + 0.5) * scale
    first_T1 = np.maximum(np.trunc(centres_T1 - support + 0.5), 0).astype(np.int64)
    last_T1 = np.minimum(np.trunc(centres_T1 + support + 0.5), size_in).astype(np.int64)
    place_TK = first_T1 + np.arange((last_T1 - first_T1).max())
    distance_TK = (place_TK - centres_T1 + 0.5) * (1.0 / filter_scale)
    weight_TK = np.where(place_TK < last_T1, _filter(distance_TK, resample), 0.0)
    weight_TK /= np.cumsum(weight_TK, axis=1)[:, -1:]  # one after the other, as Pillow adds them
    weight_TK = np.trunc(weight_TK * 2.0**_FRACTION_BITS + np.where(weight_TK < 0, -0.5, 0.5))
    return np.minimum(place_TK, size_in - 1), weight_TK


def _filter(x: np.ndarray, resample: int) -> np.ndarray:
    x = np.abs(x)
    if resample == BILINEAR:
        return np.where(x < 1.0, 1.0 - x, 0.0)
    near = ((_CUBIC + 2.0) * x - (_CUBIC + 3.0)) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * _CUBIC
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
