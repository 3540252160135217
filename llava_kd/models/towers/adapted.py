"""A tower that stock transformers cannot hold in a LLaVA, as a registered transformers model.

Feature maps become tokens row by row: the cell in row r and column c of an [h, w] map is token r * w + c,
after the trunk's prefix tokens (CLS, registers), if it has any. `hidden_states` has one entry for each
block (ViT) or stage (ConvNet) of the trunk, so -1 is the last and -2 the one before, which may be larger.

Importing this file is all that `from_pretrained` needs to read such a model.

Shape legend: I images, C channels, H and W height and width (of images or maps), N tokens, E width.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

T = TypeVar("T")
Library = Literal["timm", "open_clip", "transformers"]


class AdaptedTowerConfig(PreTrainedConfig):
    """Which trunk of which library, and the tokens of its chosen layer.

    `arguments` is what the library's constructor takes, as JSON. `patch_size` is pixels per token along an
    edge; `hidden_size` is the width at `feature_layer`.
    """

    model_type = "llava_kd_tower"

    library: str = "timm"
    architecture: str = ""
    arguments: str = "{}"
    image_size: int = 224
    patch_size: int = 16
    hidden_size: int = 768
    num_prefix_tokens: int = 0
    feature_layer: int = -2


class AdaptedTower(PreTrainedModel):
    """Pixels to `hidden_states` of [I, N, E], with a trunk of timm, open_clip or transformers inside."""

    config_class = AdaptedTowerConfig
    main_input_name = "pixel_values"
    base_model_prefix = "tower"

    def __init__(self, config: AdaptedTowerConfig) -> None:
        super().__init__(config)
        # On the CPU even where the caller builds on the meta device: trunks keep tables outside their state.
        with torch.device("cpu"):
            self.trunk = build_trunk(config.library, config.architecture, json.loads(config.arguments))
        self._tables = {
            name: tensor.clone() for name, tensor in self.trunk.named_buffers() if name not in self._stored()
        }
        self.post_init()

    def _stored(self) -> set[str]:
        return set(self.trunk.state_dict())

    def _init_weights(self, module: nn.Module) -> None:
        """Put back the tables that no checkpoint holds, which `from_pretrained` leaves blank.

        Weights are the trunk's own library's to initialise.
        """
        if module is not self:
            return
        for name, tensor in self._tables.items():
            owner, _, leaf = name.rpartition(".")
            self.trunk.get_submodule(owner).register_buffer(leaf, tensor.clone(), persistent=False)

    def forward(self, pixel_values: Tensor, **_: object) -> BaseModelOutput:
        states = tuple(hidden_states(self.trunk, self.config.library, pixel_values))
        return BaseModelOutput(last_hidden_state=states[-1], hidden_states=states)


def build_trunk(library: str, architecture: str, arguments: Mapping[str, object]) -> nn.Module:
    """The library's own module with random weights, in eval mode."""
    if library == "timm":
        import timm

        create = functools.partial(timm.create_model, architecture, pretrained=False, num_classes=0)
        return create(**dict(arguments)).eval()  # pyright: ignore[reportArgumentType]
    if library == "open_clip":
        from open_clip.model import _build_vision_tower

        return _build_vision_tower(**dict(arguments)).eval()  # pyright: ignore[reportArgumentType]
    assert library == "transformers", library
    return AutoModel.from_config(AutoConfig.for_model(architecture, **arguments)).eval()


def hidden_states(trunk: nn.Module, library: str, pixels_ICHW: Tensor) -> list[Tensor]:
    """[I, N, E] after every block or stage, before any final normalisation."""
    if library == "timm":
        return _timm_states(trunk, pixels_ICHW)
    if library == "open_clip":
        output = _intermediates(trunk)(pixels_ICHW, intermediates_only=True, **_extra(trunk))
        prefixes = output.get("image_intermediates_prefix")
        return _with_prefixes([tokens_of(m) for m in output["image_intermediates"]], prefixes)
    states = trunk(pixels_ICHW, output_hidden_states=True).hidden_states
    return [tokens_of(state) for state in states]


def _timm_states(trunk: nn.Module, pixels_ICHW: Tensor) -> list[Tensor]:
    if num_prefix_tokens(trunk) == 0:
        maps = _intermediates(trunk)(pixels_ICHW, norm=False, intermediates_only=True)
        return [tokens_of(m) for m in maps]
    pairs = _intermediates(trunk)(pixels_ICHW, norm=False, intermediates_only=True, return_prefix_tokens=True)
    return _with_prefixes([tokens_of(m) for m, _ in pairs], [prefix for _, prefix in pairs])


def _intermediates(trunk: nn.Module) -> Callable:
    """The trunk's own way to give every block's output. Raises ValueError where it has none."""
    method = vars(type(trunk)).get("forward_intermediates")
    if method is None:
        raise ValueError(f"{type(trunk).__name__} gives no intermediate tokens (forward_intermediates)")
    return functools.partial(method, trunk)


def _extra(trunk: nn.Module) -> dict[str, bool]:
    return {"output_extra_tokens": True} if num_prefix_tokens(trunk) else {}


def num_prefix_tokens(trunk: nn.Module) -> int:
    """Tokens before the patches: what timm calls its prefix, or open_clip's class embedding."""
    count = trunk.__dict__.get("num_prefix_tokens", 0)
    return count or int("class_embedding" in dict(trunk.named_parameters(recurse=False)))


def _with_prefixes(states: list[Tensor], prefixes: Sequence[Tensor] | None) -> list[Tensor]:
    if prefixes is None:
        return states
    return [torch.cat([prefix, state], dim=1) for prefix, state in zip(prefixes, states, strict=True)]


def attribute(module: nn.Module, path: str, kind: type[T]) -> T:
    """The attribute at the dotted `path`, of that kind: other libraries' modules declare no types."""
    value = functools.reduce(getattr, path.split("."), module)
    if not isinstance(value, kind):
        raise ValueError(f"{type(module).__name__}.{path} must be a {kind.__name__}; got {value!r}")
    return value


def tokens_of(state: Tensor) -> Tensor:
    """[I, N, E] of a map [I, E, H, W], row by row; tokens stay as they are.

    Raises ValueError for a state without places.
    """
    if state.dim() == 4:
        return state.flatten(2).transpose(1, 2)
    if state.dim() == 3:
        return state
    raise ValueError(
        "a vision tower must give a map or a row of tokens for each image; got a state of "
        f"{tuple(state.shape)}"
    )


AutoConfig.register(AdaptedTowerConfig.model_type, AdaptedTowerConfig)
AutoModel.register(AdaptedTowerConfig, AdaptedTower)
