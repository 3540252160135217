"""The pictures that a model is asked about, by the decoder of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor

from llava_kd.data.pixels.images import ImageTransform, decode
from llava_kd.data.sources.pictures.image_paths import read_regular

_PLAIN_RATIO, _PLAIN_SIDE = 8, 4096  # what is within both is never thin


def open_picture(source: Path | bytes, upright: bool = False) -> Image.Image:
    """RGB pixels as training sees them. ValueError or OSError for what cannot be read."""
    data = source if isinstance(source, bytes) else read_regular(source)
    return Image.fromarray(decode(data, upright=upright).numpy())


def thin_pixels(processor: BaseImageProcessor, images: Sequence[Image.Image]) -> dict[int, Tensor]:
    """Pixel values [C, H, W] of the images, by number, for which stock code would take gigabytes.

    It makes the whole of a picture that it then crops, and the square around one that it pads.
    """
    candidates = [
        k
        for k, image in enumerate(images)
        if max(image.size) > _PLAIN_SIDE or max(image.size) > _PLAIN_RATIO * min(image.size)
    ]
    if not candidates:
        return {}
    try:
        transform = ImageTransform.from_processor(processor)
    except ValueError:  # it has no fixed size: such a one bounds the longer side, and makes nothing large
        return {}
    thin = [k for k in candidates if transform.is_thin(images[k].height, images[k].width)]
    return {k: transform(torch.from_numpy(np.array(images[k]))) for k in thin}
