"""Visual features of a tower, how many tokens they make, and the hash that says two towers are the same.

Shape legend: I images, C channels, H height, W width, N tokens of an image, E tower width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel, LlavaConfig, PreTrainedConfig, SiglipVisionModel

# Vision-only class of each family that stock LLaVA reads as pixel rows -> hidden states per patch.
TOWER_CLASSES: Mapping[str, type] = {
    "siglip": SiglipVisionModel,
    "siglip_vision_model": SiglipVisionModel,
    "clip": CLIPVisionModel,
    "clip_vision_model": CLIPVisionModel,
}
_CLS_TOKENS: Mapping[str, int] = {"siglip_vision_model": 0, "clip_vision_model": 1}


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


def num_cls_tokens(config: LlavaConfig) -> int:
    """Tokens that the tower puts before its patches."""
    model_type = vision_config(config).model_type
    if model_type not in _CLS_TOKENS:
        raise ValueError(f"vision_tower must be one of {sorted(_CLS_TOKENS)}; got {model_type!r}")
    return _CLS_TOKENS[model_type]


def tokens_per_image(config: LlavaConfig) -> int:
    """Visual tokens of one image: patches plus CLS, less the first where the strategy is `default`."""
    vision = vision_config(config)
    patches = (vision.image_size // vision.patch_size) ** 2
    dropped = 1 if config.vision_feature_select_strategy == "default" else 0
    return patches + num_cls_tokens(config) - dropped


def image_features(tower: nn.Module, pixels_ICHW: Tensor, *, layer: int, strategy: str) -> Tensor:
    """Hidden states [I, N, E] of `layer`, as stock LLaVA selects them; `default` drops the first token."""
    dtype = next(tower.parameters()).dtype
    hidden_INE = tower(pixels_ICHW.to(dtype), output_hidden_states=True).hidden_states[layer]
    return hidden_INE[:, 1:] if strategy == "default" else hidden_INE


def tower_fingerprint(
    tower: nn.Module, config: LlavaConfig, image_processor: Mapping, *, dtype: torch.dtype
) -> str:
    """SHA-256 over weights, preprocessing, layer and strategy: equal means equal features for every image.

    Weights are hashed as they are in `dtype`, the one that the tower computes in. `image_processor` is the
    processor's own dictionary; keys that do not change pixels are left out.
    """
    digest = hashlib.sha256()
    pixels = {
        k: v for k, v in image_processor.items() if k not in ("image_processor_type", "processor_class")
    }
    choice = (config.vision_feature_layer, config.vision_feature_select_strategy)
    digest.update(json.dumps([pixels, choice], sort_keys=True, default=str).encode())
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        value = tensor.detach().cpu()
        value = value.to(dtype) if value.is_floating_point() else value
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
