"""The image processor of a tower, made to pad a picture to a square first."""

from __future__ import annotations

from typing import Any

from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil


def padding(processor: BaseImageProcessor) -> BaseImageProcessor:
    """Stock LLaVA's processor with these settings: it pads with the mean colour before it resizes.

    Raises ValueError for one that crops what it has resized: training would pad, and see all of the square.
    """
    kind: type[BaseImageProcessor] = LlavaImageProcessorPil
    if not type(processor).__name__.endswith("Pil"):
        from transformers import LlavaImageProcessor  # needs torchvision, as the one it stands in for does

        kind = LlavaImageProcessor
    kept = ("size", "crop_size", "resample", "image_mean", "image_std", "rescale_factor")
    flags = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
    seen = processor.to_dict()
    settings: dict[str, Any] = {key: seen[key] for key in (*kept, *flags) if seen.get(key) is not None}
    shortest, crop = settings.get("size", {}).get("shortest_edge"), settings.get("crop_size") or {}
    if seen.get("do_center_crop") and shortest and {shortest} != set(crop.values()):
        raise ValueError(
            f"image_aspect_ratio is pad, and the image processor of the tower resizes to {shortest}, crops "
            f"to {dict(crop)}, which cannot be done together here; take a checkpoint with square"
        )
    settings |= {"do_center_crop": bool(seen.get("do_center_crop")), "do_pad": True}
    return kind(**settings)
