"""A vision tower of any library, ready to stand in a LLaVA, with the image processor that feeds it.

Shape legend: I images, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import (
    MODEL_MAPPING,
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipImageProcessor,
)
from transformers.image_processing_utils import BaseImageProcessor

# transformers 5.17 hides it at its top level where torchvision is not installed, though it is not needed.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from llava_kd.models.reading import existing, read_config, read_pretrained, readable
from llava_kd.models.tower_source import TowerSource, tower_source
from llava_kd.models.towers.families import FAMILIES, VISION_PARTS, Family, tell_facts
from llava_kd.models.towers.libraries import Pixels, Trunk, adapted, library_tower
from llava_kd.models.towers.vision_tower import input_size


@dataclass(frozen=True, kw_only=True)
class LoadedTower:
    """A tower and what it wants to see."""

    model: PreTrainedModel
    image_processor: BaseImageProcessor


def load_tower(
    text: str,
    *,
    feature_layer: int,
    dtype: torch.dtype,
    seed: int = 0,
    families: Mapping[str, Family] = FAMILIES,
) -> LoadedTower:
    """The tower that `text` names, of one of the `families`; see `tower_source` for its form.

    Raises ValueError for an unknown name, a tower without patch tokens, or an image size it cannot take.
    """
    source = tower_source(text)
    if source.library != "open_clip" and not isinstance(source.options.get("pretrained", True), bool):
        raise ValueError(
            f"vision tower {text!r}: pretrained must be true or false; got {source.options['pretrained']!r}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # for `?pretrained=false`
        if source.library == "transformers":
            loaded = _transformers_tower(source, feature_layer, families)
        else:
            model, pixels = library_tower(source, feature_layer=feature_layer)
            loaded = LoadedTower(model=model, image_processor=_square_processor(pixels))
    nn.Module.to(loaded.model, dtype)
    loaded.model.eval()
    return loaded


def _square_processor(pixels: Pixels) -> BaseImageProcessor:
    """The stock processor that stretches to a square; SigLIP's has no rule of its own beside that."""
    return SiglipImageProcessor(
        size={"height": pixels.size, "width": pixels.size},
        image_mean=list(pixels.mean),
        image_std=list(pixels.std),
        resample=pixels.resample,
    )


def _transformers_tower(
    source: TowerSource, feature_layer: int, families: Mapping[str, Family]
) -> LoadedTower:
    if unknown := sorted(source.constructor_options()):
        raise ValueError(
            f"vision tower {source.name} of transformers takes the options pretrained and image_size; got "
            f"{', '.join(unknown)}"
        )
    name = existing(source.name, "the vision tower")
    config = read_config(name)
    vision = config.vision_config if config.model_type in VISION_PARTS else config
    family = families.get(vision.model_type)
    if family is None and vision.model_type in ("siglip2_vision_model", "pixtral"):
        raise ValueError(
            f"vision tower {name} is a {config.model_type!r} model, which reads patches and their places "
            "instead of a picture of fixed size; take a fixed-resolution checkpoint of that family "
            "(SigLIP2's are of type 'siglip')"
        )
    if family is None and not _reads_pixels(vision):
        raise ValueError(
            f"vision tower {name} is a {config.model_type!r} model; stock LLaVA needs one of "
            f"{sorted(families)}, or a model of pixels whose feature maps can be adapted"
        )
    kind = AutoModel if family is None else family.model_class
    if source.is_pretrained:
        model = read_pretrained(kind, name, torch.float32)
    else:
        model = AutoModel.from_config(vision)
    processor = _image_processor(name)
    model.eval()
    if source.image_size is not None:
        processor = _resized(processor, source.image_size)
    if family is None:
        model = _adapted(model, processor, name, feature_layer)
    else:
        tell_facts(model.config, family)
    return LoadedTower(model=model, image_processor=processor)


def _image_processor(name: str) -> BaseImageProcessor:
    if Path(name).is_dir() and not any(
        (Path(name) / file).is_file() for file in ("preprocessor_config.json", "processor_config.json")
    ):
        raise ValueError(
            f"vision tower {name} must hold preprocessor_config.json, which says how to prepare pictures; it "
            "is not there: copy it from where the weights come from"
        )
    with readable("the image processor of", name):
        return AutoImageProcessor.from_pretrained(name)


def _reads_pixels(config: PreTrainedConfig) -> bool:
    kind = MODEL_MAPPING.get(type(config), None)
    return (
        isinstance(kind, type)
        and issubclass(kind, PreTrainedModel)
        and kind.main_input_name == "pixel_values"
    )


def _resized(processor: BaseImageProcessor, size: int) -> BaseImageProcessor:
    seen = processor.to_dict()
    pixels = Pixels(size=size, mean=seen["image_mean"], std=seen["image_std"], resample=int(seen["resample"]))
    return _square_processor(pixels)


def _adapted(
    model: PreTrainedModel, processor: BaseImageProcessor, name: str, feature_layer: int
) -> PreTrainedModel:
    """A transformers model of another family, read through its hidden states."""
    seen = processor.to_dict()
    height, width = input_size(processor)
    if height != width:
        raise ValueError(f"vision tower {name} must read squares; its processor gives {height} x {width}")
    arguments = {
        k: v for k, v in model.config.to_diff_dict().items() if k not in ("model_type", "architectures")
    }
    pixels = Pixels(size=height, mean=tuple(seen["image_mean"]), std=tuple(seen["image_std"]))
    trunk = Trunk(
        module=model,
        library="transformers",
        architecture=model.config.model_type,
        arguments=arguments,
        pixels=pixels,
        plain=None,
    )
    return adapted(trunk, feature_layer)
