"""From Pillow's many modes to 8-bit RGB: as `convert` does where it is faithful, else scaled or refused.

Shape legend: H height, W width, C channels.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

_BITS_TAG, _PHOTOMETRIC_TAG, _SAMPLE_FORMAT_TAG = 258, 262, 339  # of TIFF
_WHITE_IS_ZERO = 0
_UNSIGNED = (1, 4)  # whole numbers from 0, or not said
_NUMBERS = {2: "signed", 3: "floating-point", 5: "complex", 6: "complex"}
_SHARED_ALPHA = {"La": "LA", "RGBa": "RGBA"}
_BLACK = 16  # of 255: an image that is nowhere brighter was meant for another range
_ADVICE = "save it with 8 bits a channel, scaled as it should look"


def to_rgb(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3]. ValueError for a mode whose values have no known place between black and white.

    Palettes are looked up, and alpha is dropped, as Pillow's `convert` does, since published checkpoints were
    trained so. Grey of 12 or 16 bits keeps its high bits, as Pillow keeps those of colours; `convert` would
    cut it off at 255 instead.
    """
    formats = _tag(image, _SAMPLE_FORMAT_TAG, 1)
    if formats not in _UNSIGNED:
        raise ValueError(f"its values are {_NUMBERS.get(formats, 'of an unknown kind')} numbers; {_ADVICE}")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return np.repeat(_high_bits(image)[..., None], 3, axis=2)
    if image.mode[0] in "IF":
        kind = "32-bit integers" if image.mode[0] == "I" else "floating-point numbers"
        raise ValueError(f"its values are {kind} (mode {image.mode}); {_ADVICE}")
    if image.mode in _SHARED_ALPHA:  # `convert` has no way from here to RGB in one step
        image = image.convert(_SHARED_ALPHA[image.mode])
    return np.array(image.convert("RGB"))


def _high_bits(image: Image.Image) -> np.ndarray:
    """uint8 [H, W] of whole numbers of 12 or 16 bits."""
    bits = 12 if _tag(image, _BITS_TAG, 16) == 12 else 16
    values_HW = np.array(image).astype(np.int64)
    grey_HW = (values_HW >> (bits - 8)).clip(0, 255).astype(np.uint8)
    if values_HW.max() > 0 and grey_HW.max() < _BLACK:
        raise ValueError(
            f"its largest value is {values_HW.max()} of {2**bits - 1}, so it would be black; {_ADVICE}"
        )
    return 255 - grey_HW if _tag(image, _PHOTOMETRIC_TAG, 1) == _WHITE_IS_ZERO else grey_HW


def _tag(image: Image.Image, number: int, default: int) -> int:
    """A tag of a TIFF file, the first channel's where each has its own."""
    tags = getattr(image, "tag_v2", None)  # JPEG's MPO has one too, about its frames
    value = tags.get(number, default) if image.format == "TIFF" and tags is not None else default
    return int(value[0] if isinstance(value, tuple) else value)
