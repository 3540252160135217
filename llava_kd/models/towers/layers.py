"""Which weights of a tower its features come from, and which of those are its last layers.

Both are asked of a copy without memory, so the answer holds for every family and version of its library.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlavaConfig, PreTrainedModel

from llava_kd.models.towers.stages import without_weights
from llava_kd.models.towers.vision_tower import feature_layer, image_features, vision_config

# Where the families keep their blocks or stages, below `vision_model` or `trunk` if there is one.
_LISTS = (
    *("encoder.layers", "encoder.layer", "layers", "model.layer", "layer"),
    *("transformer.resblocks", "blocks", "encoder.stages", "stages"),
)
_INSIDE = ("", "vision_model.", "trunk.")


def read_parameters(tower: PreTrainedModel, config: LlavaConfig) -> frozenset[str]:
    """Names of the parameters that the chosen features depend on.

    With layer -2 the last block is not read, nor are final norms, poolers and heads with most layers. Those
    get no gradient, for which a sharded engine would wait.
    """
    ghost, pixels_ICHW = without_weights(tower, config)
    with torch.device("meta"):
        features_INE = image_features(ghost, pixels_ICHW, layer=feature_layer(config), strategy="full")
        named = dict(ghost.named_parameters())
        gradients = torch.autograd.grad(features_INE.sum(), list(named.values()), allow_unused=True)
    return frozenset(name for name, gradient in zip(named, gradients, strict=True) if gradient is not None)


def last_layers(tower: PreTrainedModel, config: LlavaConfig, count: int) -> frozenset[str]:
    """Names of the parameters of the last `count` layers that are read.

    Raises ValueError for a tower with fewer, or whose layers stand in no list.
    """
    read = read_parameters(tower, config)
    path, layers = _layers(tower)
    owned = [[f"{path}.{i}.{name}" for name, _ in layer.named_parameters()] for i, layer in enumerate(layers)]
    reached = [names for names in owned if not read.isdisjoint(names)]
    if not 0 < count <= len(reached):
        raise ValueError(
            f"vision_tower_last_layers is {count}; the features of this {vision_config(config).model_type!r} "
            f"tower, taken at vision_feature_layer {feature_layer(config)}, come from {len(reached)} of its "
            f"{len(layers)} layers; take 1 to {len(reached)}, or null for the whole tower"
        )
    return frozenset(name for names in reached[-count:] for name in names)


def _layers(tower: nn.Module) -> tuple[str, nn.ModuleList | nn.Sequential]:
    for inside in _INSIDE:
        for name in _LISTS:
            path = f"{inside}{name}"
            found = dict(tower.named_modules()).get(path)
            if isinstance(found, nn.ModuleList | nn.Sequential):
                return path, found
    raise ValueError(
        f"vision_tower_last_layers: the layers of a {type(tower).__name__} are in no known list; set it to "
        "null, to train the whole tower"
    )
