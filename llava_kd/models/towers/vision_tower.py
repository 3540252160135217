"""Visual features of a tower, how many tokens they make, and the hash that says two towers are the same.

Shape legend: I images, C channels, H height, W width, N tokens of an image, E tower width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import BaseImageProcessor, LlavaConfig, PreTrainedConfig

from llava_kd.models.towers.adapted import AdaptedTowerConfig
from llava_kd.models.towers.families import FAMILIES, Family, own_facts


def vision_config(config: LlavaConfig) -> PreTrainedConfig:
    assert isinstance(config.vision_config, PreTrainedConfig)
    return config.vision_config


def text_config(config: LlavaConfig) -> PreTrainedConfig:
    assert isinstance(config.text_config, PreTrainedConfig)
    return config.text_config


def feature_layer(config: LlavaConfig) -> int:
    """The one hidden state that feeds the projector. Raises ValueError where several are concatenated."""
    if not isinstance(config.vision_feature_layer, int):
        raise ValueError(f"vision_feature_layer must be one layer; got {config.vision_feature_layer}")
    return config.vision_feature_layer


def family(config: LlavaConfig) -> Family:
    """Raises ValueError for a tower that no family describes, nor its own configuration."""
    vision = vision_config(config)
    found = FAMILIES.get(vision.model_type) or own_facts(vision)
    if found is None:
        raise ValueError(f"vision_tower must be one of {sorted(FAMILIES)}; got {vision.model_type!r}")
    return found


def num_prefix_tokens(config: LlavaConfig) -> int:
    """Tokens that the tower puts before its patches: CLS and registers."""
    vision = vision_config(config)
    if isinstance(vision, AdaptedTowerConfig):
        return vision.num_prefix_tokens
    return family(config).num_cls + vision.to_dict().get("num_register_tokens", 0)


def grid(config: LlavaConfig, image_size: tuple[int, int] | None = None) -> tuple[int, int]:
    """Rows and columns of patches of an image of `image_size`, by default the tower's own.

    Raises ValueError for a size that the tower cannot take.
    """
    vision = vision_config(config)
    patch = vision.patch_size
    own = (vision.image_size, vision.image_size)
    height, width = image_size or own
    kind = family(config)
    if kind.any_size and (height % patch or width % patch):
        raise ValueError(
            f"images for a {vision.model_type!r} tower must be multiples of its patch size {patch}; the "
            f"image processor gives {height} x {width}"
        )
    if not kind.any_size and (height, width) != own:
        raise ValueError(
            f"this {vision.model_type!r} tower takes images of {own[0]} x {own[1]} pixels; the image "
            f"processor gives {height} x {width}; change its size or take another tower"
        )
    return height // patch, width // patch


def tokens_per_image(config: LlavaConfig, image_size: tuple[int, int] | None = None) -> int:
    """Visual tokens of one image: patches and prefix, less the first where the strategy is `default`."""
    rows, columns = grid(config, image_size)
    dropped = 1 if config.vision_feature_select_strategy == "default" else 0
    return rows * columns + num_prefix_tokens(config) - dropped


def input_size(processor: BaseImageProcessor) -> tuple[int, int]:
    """Height and width of what an image processor gives. Raises ValueError where it varies."""
    settings = processor.to_dict()
    size = settings.get("size") or {}
    if settings.get("do_center_crop") and settings.get("crop_size"):
        size = settings["crop_size"]
    if "height" not in size or "width" not in size:
        raise ValueError(
            f"the image processor must give a fixed size; got size {dict(size)}: set height and width in "
            "preprocessor_config.json"
        )
    return size["height"], size["width"]


def tower_states(tower: nn.Module, pixels_ICHW: Tensor) -> Sequence[Tensor]:
    """[I, N, E] of every hidden state; those of a ConvNet differ in N and E."""
    dtype = next(tower.parameters()).dtype
    return tower(pixels_ICHW.to(dtype), output_hidden_states=True).hidden_states


def image_features(tower: nn.Module, pixels_ICHW: Tensor, *, layer: int, strategy: str) -> Tensor:
    """Hidden states [I, N, E] of `layer`, as stock LLaVA selects them; `default` drops the first token."""
    return selected(tower_states(tower, pixels_ICHW), layer=layer, strategy=strategy)


def selected(states: Sequence[Tensor], *, layer: int, strategy: str) -> Tensor:
    """Of all hidden states what `image_features` gives. ValueError for a layer that is not there."""
    if not -len(states) <= layer < len(states):
        raise ValueError(
            f"vision_feature_layer is {layer}, but the tower has {len(states)} hidden states: choose from "
            f"{-len(states)} (its input) to -1 (its last block)"
        )
    hidden_INE = states[layer]
    return hidden_INE[:, 1:] if strategy == "default" else hidden_INE


def tower_fingerprint(
    tower: nn.Module, config: LlavaConfig, image_processor: Mapping, *, dtype: torch.dtype
) -> str:
    """SHA-256 over weights, configuration, preprocessing, layer and strategy: equal means equal features.

    Weights are hashed as they are in `dtype`, the one that the tower computes in: other activations, heads or
    epsilons make other features of equal ones. `image_processor` is the processor's own dictionary; keys that
    do not change pixels are left out.
    """
    digest = hashlib.sha256()
    pixels = {
        k: v for k, v in image_processor.items() if k not in ("image_processor_type", "processor_class")
    }
    choice = (config.vision_feature_layer, config.vision_feature_select_strategy)
    settings = computing_settings(vision_config(config))
    digest.update(json.dumps([pixels, choice, settings], sort_keys=True, default=str).encode())
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        value = tensor.detach().cpu()
        value = value.to(dtype) if value.is_floating_point() else value
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def computing_settings(config: PreTrainedConfig) -> dict[str, object]:
    """What a configuration says of how a model computes; not where it was read, or how it is trained."""
    known = type(config)().to_dict().keys() | {"model_type"}  # others its class does not read
    silent = {*PreTrainedConfig().to_dict(), "projection_dim", "vision_use_head", "_name_or_path"}
    silent |= {name for name in known if "dropout" in name or "initializer" in name or "drop_path" in name}
    settings = config.to_dict()
    return {n: settings.get(n) for n in sorted(known) if n == "model_type" or n not in silent}
