"""Whether a model was trained on photos turned upright: a model directory remembers it.

It stands as `do_exif_transpose` among the settings of the image processor. Stock image processors keep that
entry and do not act on it; they are given pixels, which have no tag.
"""

from __future__ import annotations

import copy

from transformers import LlavaProcessor

_ENTRY = "do_exif_transpose"


def reads_upright(processor: LlavaProcessor) -> bool:
    return bool(processor.image_processor.to_dict().get(_ENTRY))


def remember(processor: LlavaProcessor, *, upright: bool) -> None:
    """Give `processor` an image processor that says so, for whoever loads it once it is saved.

    One that never heard of orientation stays as it is, so that other directories stay byte for byte.
    """
    if upright or reads_upright(processor):
        processor.image_processor = copy.copy(processor.image_processor)
        setattr(processor.image_processor, _ENTRY, upright)
