"""Pillow's antialiased resize, bit for bit, on the CPU and on a GPU.

Pillow resizes one axis, rounds to uint8, and resizes the other, with weights in 22-bit fixed point. All of
it is exact in integers, which the part in C adds where it was built (`compiled`), and in float64 matrix
products, in whatever order a device adds. The horizontal axis always goes
first, as in every Pillow before 13.0 and so in the training of every published checkpoint; Pillow 13 swaps
the axes for some tall images.

Shape legend: H height, W width, C channels, S input size, T and X wanted outputs (rows,
columns), K inputs of an output.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llava_kd.data.pixels import compiled

BILINEAR = int(Image.Resampling.BILINEAR)
BICUBIC = int(Image.Resampling.BICUBIC)
_SUPPORT = {BILINEAR: 1.0, BICUBIC: 2.0}
_FRACTION_BITS = 22
_CUBIC = -0.5
_BLOCK = 1 << 22  # values of a block of rows, in float64
_DEVICE_BLOCK = 1 << 24
_COLUMNS = 1 << 11  # inputs along a row that are multiplied at once
_KEPT_LENGTH = 1 << 12  # of longer axes the weights are made anew


def check_filter(resample: int) -> None:
    """ValueError for a filter number of Pillow's that is not here."""
    if resample not in _SUPPORT:
        raise ValueError(f"resample must be {BILINEAR} (bilinear) or {BICUBIC} (bicubic), got {resample}")


def resize(pixels_HWC: Tensor, size: tuple[int, int], resample: int) -> Tensor:
    """uint8 [*size, C] by Pillow's filter number `resample`."""
    if pixels_HWC.device.type != "cpu":
        return resize_by_products(pixels_HWC, size, resample)
    if compiled.can_resize(pixels_HWC):
        return resize_by_c(pixels_HWC, size, resample)
    return resize_by_pillow(pixels_HWC, size, resample)


def resize_fast(pixels_HWC: Tensor, size: tuple[int, int], resample: int) -> Tensor:
    """The same filter in torch's uint8 kernel of the CPU: far quicker, but some pixels differ by 1 or 2."""
    mode = "bicubic" if resample == BICUBIC else "bilinear"
    image_1CHW = pixels_HWC.permute(2, 0, 1)[None]
    resized_1CHW = torch.nn.functional.interpolate(
        image_1CHW, size=size, mode=mode, antialias=True, align_corners=False
    )
    return resized_1CHW[0].permute(1, 2, 0)


def resize_by_c(
    pixels_HWC: Tensor, size: tuple[int, int], resample: int, kernel: str | None = None
) -> Tensor:
    """The same in C, where that was built, by the quickest kernel unless one is named."""
    rows, columns = (
        (_table if length <= _KEPT_LENGTH else _table.__wrapped__)(length, out, resample)
        for length, out in zip(pixels_HWC.shape[:2], size, strict=True)
    )
    return compiled.resize(pixels_HWC, rows, columns, kernel)


def resize_by_pillow(pixels_HWC: Tensor, size: tuple[int, int], resample: int) -> Tensor:
    """An axis at a time, so that the order does not depend on Pillow's version."""
    height, width = size
    image = Image.fromarray(pixels_HWC.numpy())
    for step in ((width, image.height), (width, height)):
        if image.size != step:
            image = image.resize(step, Image.Resampling(resample))
    return torch.from_numpy(np.array(image))


def resize_by_products(pixels_HWC: Tensor, size: tuple[int, int], resample: int) -> Tensor:
    """The same in matrix products, on any device."""
    height, width = pixels_HWC.shape[:2]
    rows = Axis(length=height, out=size[0], wanted=range(size[0]))
    columns = Axis(length=width, out=size[1], wanted=range(size[1]))
    return resize_part(pixels_HWC, rows, columns, resample)


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis of a resize that need not be made whole: `length` inputs to `out` outputs, some `wanted`.

    The image begins at input `start`; the inputs before and behind it are a border of one colour.
    """

    length: int
    out: int
    wanted: range
    start: int = 0


def resize_part(
    pixels_HWC: Tensor,
    rows: Axis,
    columns: Axis,
    resample: int,
    colour_C: Tensor | None = None,
) -> Tensor:
    """The wanted part of what `resize` would make of the image within its border of `colour_C`.

    Neither the border nor the part that is not wanted is made, and no block of more than some megabytes.
    """
    device = pixels_HWC.device
    down = _Taps(rows, pixels_HWC.shape[0], resample, device)
    across = _Taps(columns, pixels_HWC.shape[1], resample, device)
    inside_HWC = pixels_HWC[down.read.start : down.read.stop, across.read.start : across.read.stop]
    height, width, channels = inside_HWC.shape
    wanted = len(columns.wanted)
    sums_TX = torch.zeros(len(rows.wanted), channels * wanted, dtype=torch.float64, device=device)
    beside_CX = torch.zeros(channels, 1, dtype=torch.float64, device=device)
    if colour_C is not None:  # what the border adds to each row, and what rows of nothing else become
        colour_C1 = colour_C.to(device).double()[:, None]
        beside_CX = colour_C1 * across.outside()
        above_CX = _rounded(beside_CX + colour_C1 * across.inside())
        sums_TX += down.outside()[:, None] * above_CX.flatten()
    block = _BLOCK if device.type == "cpu" else _DEVICE_BLOCK
    step = max(1, block // (channels * max(wanted, min(width, _COLUMNS))))
    for top in range(0, height, step):
        part_HCW = inside_HWC[top : top + step].permute(0, 2, 1)
        sums_HCX = beside_CX.expand(len(part_HCW), channels, wanted).clone()
        for left in range(0, width, _COLUMNS):
            touched, weights_XS = across.weights(left, min(left + _COLUMNS, width))
            sums_HCX[..., touched] += part_HCW[..., left : left + _COLUMNS].double() @ weights_XS.T
        done_HX = _rounded(sums_HCX).reshape(len(part_HCW), channels * wanted)
        touched, weights_TS = down.weights(top, top + len(part_HCW))
        sums_TX[touched] += weights_TS @ done_HX.double()
    return _rounded(sums_TX).reshape(len(rows.wanted), channels, wanted).permute(0, 2, 1)


def _rounded(sums: Tensor) -> Tensor:
    return torch.floor(sums * 2.0**-_FRACTION_BITS + 0.5).clamp(0, 255).to(torch.uint8)


class _Taps:
    """Weights along one axis, in units of 2^-22. `read` are the image's inputs that have a weight at all."""

    def __init__(self, axis: Axis, extent: int, resample: int, device: torch.device) -> None:
        make = _taps_on if axis.length <= _KEPT_LENGTH else _taps_on.__wrapped__
        self._place_TK, self._weight_TK, self._first_T, self._last_T = make(device, axis, resample)
        begin = max(int(self._first_T[0]), axis.start)
        stop = max(min(int(self._last_T[-1]) + 1, axis.start + extent), begin)
        self.read = range(begin - axis.start, stop - axis.start)
        self._begin = begin

    def inside(self) -> Tensor:
        """Of each output, the sum of the weights of the inputs that are read."""
        first, stop = self._begin, self._begin + len(self.read)
        inside_TK = (self._place_TK >= first) & (self._place_TK < stop)
        return torch.where(inside_TK, self._weight_TK, 0).sum(1)

    def outside(self) -> Tensor:
        """Of each output, the sum of the border's weights."""
        return self._weight_TK.sum(1) - self.inside()

    def weights(self, first: int, stop: int) -> tuple[slice, Tensor]:
        """The outputs that some inputs have a weight in, and those weights, float64 [outputs, stop - first].

        The inputs are counted from the first that is read.
        """
        start = self._begin + first
        low = int(np.searchsorted(self._last_T, start, "left"))
        high = int(np.searchsorted(self._first_T, start + stop - first, "left"))
        place_TK, weight_TK = self._place_TK[low:high] - start, self._weight_TK[low:high]
        is_here_TK = (place_TK >= 0) & (place_TK < stop - first)
        weights_TS = weight_TK.new_zeros(high - low, stop - first)
        weights_TS.scatter_add_(
            1, torch.where(is_here_TK, place_TK, 0), torch.where(is_here_TK, weight_TK, 0)
        )
        return slice(low, high), weights_TS


@lru_cache(maxsize=1024)
def _table(length: int, out: int, resample: int) -> compiled.Table:
    return compiled.Table.of(*taps(length, out, resample))


@lru_cache(maxsize=4096)
def _taps_on(
    device: torch.device, axis: Axis, resample: int
) -> tuple[Tensor, Tensor, np.ndarray, np.ndarray]:
    """`taps`, kept on the device: some kilobytes a size, where the whole matrix has megabytes.

    Behind them the first and the last input that each output may read.
    """
    place_TK, weight_TK = taps(axis.length, axis.out, resample, wanted=axis.wanted)
    on_device = torch.from_numpy(place_TK).to(device), torch.from_numpy(weight_TK).to(device)
    return *on_device, place_TK[:, 0].copy(), place_TK[:, -1].copy()


def taps(
    size_in: int, size_out: int, resample: int, *, wanted: range | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The inputs that each wanted output reads, int64 [T, K], and their weights as Pillow rounds them.

    An output that reads fewer than K inputs has weights of zero at the end.
    """
    scale = size_in / size_out
    filter_scale = max(scale, 1.0)
    support = _SUPPORT[resample] * filter_scale
    wanted = range(size_out) if wanted is None else wanted
    centres_T1 = (np.arange(wanted.start, wanted.stop)[:, None] + 0.5) * scale
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
