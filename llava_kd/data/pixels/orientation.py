"""How a camera was held, as it notes beside a photo (EXIF tag 0x0112, or XMP), and turning by that.

Shape legend: H height, W width, C channels.
"""

from __future__ import annotations

import numpy as np
from PIL import ExifTags, Image

AS_STORED = 1
# Without one of these a file has no tag, and need not be opened to look for it.
_MARKS = (b"Exif", b"eXIf", b"EXIF", b"tiff:Orientation")
# By the tag's value: whether rows and columns change places, and which of the two then run backwards.
_TURNS = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


def may_be_tagged(data: bytes) -> bool:
    return any(mark in data for mark in _MARKS)


def tag_of(image: Image.Image) -> int:
    """What Pillow reads, 1 to 8; `AS_STORED` for none and for any other value. Pillow's own errors."""
    if image.format == "TIFF":  # Pillow has turned it, or will while it loads
        return AS_STORED
    tag = image.getexif().get(ExifTags.Base.Orientation, AS_STORED)
    return next((known for known in _TURNS if known == tag), AS_STORED)  # a fraction may equal one


def turned(pixels_HWC: np.ndarray, tag: int) -> np.ndarray:
    """Upright pixels, as `PIL.ImageOps.exif_transpose` makes them; of tags 5 to 8 with the sides swapped."""
    if tag == AS_STORED:
        return pixels_HWC
    swaps, rows, columns = _TURNS[tag]
    upright_HWC = pixels_HWC.transpose(1, 0, 2) if swaps else pixels_HWC
    upright_HWC = upright_HWC[:: -1 if rows else 1, :: -1 if columns else 1]
    return np.ascontiguousarray(upright_HWC)
