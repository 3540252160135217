"""The pictures that a model is asked about, by the decoder of training."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from llava_kd.data.image_paths import read_regular
from llava_kd.data.images import decode


def open_picture(source: Path | bytes) -> Image.Image:
    """RGB pixels as training sees them. ValueError or OSError for what cannot be read."""
    data = source if isinstance(source, bytes) else read_regular(source)
    return Image.fromarray(decode(data).numpy())
