"""JPEG decoding on a GPU (nvJPEG, through torchvision), for those who ask for it: `data.decode: nvjpeg`.

It takes decoding off the CPU at a price. Chroma is upsampled by the nearest sample, so pixels differ from
those of every CPU decoder; and the hardware decoder of an H100 writes its output before the work that is
queued on the caller's stream (https://github.com/pytorch/vision/pull/9606), so that stream is drained first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    ImageReadMode = decode_jpeg = None

Decoder = Literal["cpu", "nvjpeg"]

_START, _END, _SCAN, _BASELINE, _ADOBE = 0xD8, 0xD9, 0xDA, 0xC0, 0xEE
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # C4, C8 and CC are no frame headers


def check_decoder(decoder: Decoder, device: torch.device) -> None:
    """ValueError if `decoder` cannot run for batches on `device`."""
    if decoder == "cpu":
        return
    if device.type != "cuda":
        raise ValueError(
            f"`data.decode` nvjpeg decodes on a CUDA device, but this run is on {device.type}; set it to cpu"
        )
    if decode_jpeg is None:
        raise ValueError(
            "`data.decode` nvjpeg needs torchvision: pip install 'llava_kd[towers]', or set it to cpu"
        )


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of what nvJPEG may be given: a whole baseline JPEG in YCbCr of 8 bits; else None.

    Everything else is for a CPU decoder: progressive files (not for the hardware engine), grey ones (one
    channel in torchvision's default mode), four components, RGB within JPEG, and files cut short.
    """
    if not data.startswith(b"\xff\xd8\xff") or not data.endswith(b"\xff\xd9"):
        return None
    size = None
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # fill
            place += 1
            continue
        length = int.from_bytes(data[place + 2 : place + 4])
        segment = data[place + 4 : place + 2 + length]
        if marker == _SCAN:
            return size
        if marker in (_START, _END) or length < 2 or len(segment) != length - 2:
            return None
        if marker in _FRAMES:
            if marker != _BASELINE or not _is_ycbcr_frame(segment):
                return None
            size = (int.from_bytes(segment[1:3]), int.from_bytes(segment[3:5]))
            if 0 in size:
                return None
        if marker == _ADOBE and segment.startswith(b"Adobe") and segment[-1] != 1:  # 1: YCbCr
            return None
        place += 2 + length
    return None


def _is_ycbcr_frame(segment: bytes) -> bool:
    """Whether a frame header has 8 bits and three components that are not named R, G, B."""
    return len(segment) == 6 + 3 * 3 and segment[0] == 8 and segment[6::3] != b"RGB"


def decode_jpegs(encoded: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """uint8 [H, W, 3] on `device` of each JPEG, given as bytes on the host. Waits for the current stream.

    ValueError if a JPEG cannot be decoded.
    """
    if not encoded:
        return []
    assert decode_jpeg is not None
    assert ImageReadMode is not None
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    try:
        decoded = decode_jpeg(list(encoded), mode=ImageReadMode.RGB, device=device)
    except RuntimeError as error:
        raise ValueError(f"nvJPEG cannot decode it: {error}") from None
    assert isinstance(decoded, list)
    return [image_CHW.permute(1, 2, 0).contiguous() for image_CHW in decoded]
