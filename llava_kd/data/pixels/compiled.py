"""Whether the part of the package that is written in C does the pixels' work on this CPU: decided here alone.

It is built where there is a C compiler, and quicker than Pillow and PyTorch; without it they do the same work
and every bit is the same.

Shape legend: H height, W width, C channels, I images, T outputs of an axis, K inputs of an output.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

try:
    from llava_kd.data.pixels import _resample
except ImportError:
    _resample = None

KERNELS: tuple[str, ...] = () if _resample is None else tuple(_resample.kernels())


@dataclass(frozen=True, kw_only=True)
class Table:
    """Of each output of an axis the first input, int32 [T], and the weights in units of 2^-22, int32 [T, K].

    K is a multiple of 4; behind an output's own inputs the weights are zero.
    """

    first_T: np.ndarray
    weight_TK: np.ndarray

    @classmethod
    def of(cls, place_TK: np.ndarray, weight_TK: np.ndarray) -> Table:
        """From what `taps` gives."""
        padding = -weight_TK.shape[1] % 4
        return cls(
            first_T=np.ascontiguousarray(place_TK[:, 0], dtype=np.int32),
            weight_TK=np.pad(weight_TK, ((0, 0), (0, padding))).astype(np.int32),
        )


def resizer() -> str:
    """Who resizes on the CPU, for a reader."""
    return f"the part in C ({KERNELS[0]})" if KERNELS else "Pillow"


def can_resize(pixels_HWC: Tensor) -> bool:
    return bool(KERNELS) and pixels_HWC.dtype == torch.uint8 and pixels_HWC.shape[2] == 3


def resize(pixels_HWC: Tensor, rows: Table, columns: Table, kernel: str | None = None) -> Tensor:
    """uint8 [rows.T, columns.T, 3] from uint8 [H, W, 3] on the CPU; `kernel` is the quickest unless named."""
    assert _resample is not None
    height, width = pixels_HWC.shape[:2]
    out_HWC = torch.empty(len(rows.first_T), len(columns.first_T), 3, dtype=torch.uint8)
    _resample.resize(
        kernel or KERNELS[0],
        pixels_HWC.contiguous().numpy(),
        height,
        width,
        rows.first_T,
        rows.weight_TK,
        columns.first_T,
        columns.weight_TK,
        out_HWC.numpy(),
    )
    return out_HWC


def can_look_up(pixels_IHWC: Tensor) -> bool:
    return pixels_IHWC.device.type == "cpu" and bool(KERNELS) and pixels_IHWC.numel() > 0


def look_up(pixels_IHWC: Tensor, table_CV: Tensor, out_ICHW: Tensor) -> None:
    """Into `out_ICHW`, contiguous float32, what stands for each uint8 value in float32 [3, 256]."""
    assert _resample is not None
    plane = pixels_IHWC.shape[1] * pixels_IHWC.shape[2]
    _resample.look_up(pixels_IHWC.contiguous().numpy(), plane, table_CV.numpy(), out_ICHW.numpy())
