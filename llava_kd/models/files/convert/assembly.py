"""The pieces of a checkpoint of another layout, put together as a stock LLaVA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.image_processing_utils import BaseImageProcessor

# transformers 5.17 hides it at its top level where torchvision is not installed, though it is not needed.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from llava_kd.models.files.checkpoint import Parts, compose_loaded
from llava_kd.models.files.convert.pixels import padding
from llava_kd.models.files.convert.projector import put_projector, scale_as_before
from llava_kd.models.files.convert.weights import filled, quiet
from llava_kd.models.language_model import prepare_language_model
from llava_kd.models.reading import read_config, read_tokenizer, readable
from llava_kd.models.tower_source import tower_source
from llava_kd.models.towers.families import FAMILIES, VISION_PARTS
from llava_kd.models.towers.loading import LoadedTower, load_tower

STRATEGIES: Mapping[str, Literal["default", "full"]] = {
    **{"patch": "default", "cls_patch": "full", "default": "default", "full": "full"}
}


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """What a layout is made of.

    `tower` says where the image processor comes from, and the tower too where `tower_state` is empty;
    `tower_config` is that of the checkpoint's own tower, None to take the one of `tower`. `added_tokens` are
    those that the tokenizer must have, in the order of their rows.
    """

    source: Path
    text_config: Mapping
    text_state: Mapping[str, Tensor]
    tokenizers: tuple[str, ...]
    tower: str
    tower_config: Mapping | None
    tower_state: Mapping[str, Tensor]
    projector: Mapping[str, Tensor]
    projector_kind: str | None
    layer: object
    strategy: str
    aspect: object
    added_tokens: tuple[str, ...] = ()
    version: object = None


def assemble(pieces: Pieces) -> Parts:
    """Raises ValueError for pieces that do not fit together, or that stock LLaVA has no place for."""
    source = pieces.source
    if pieces.strategy not in STRATEGIES:
        raise ValueError(
            f"{source}: the select strategy must be one of {list(STRATEGIES)}; got {pieces.strategy!r}"
        )
    if not isinstance(pieces.layer, int):
        raise ValueError(f"{source}: vision_feature_layer must be one layer; got {pieces.layer}")
    if pieces.aspect not in (None, "", "square", "pad"):
        raise ValueError(
            f"{source}: image_aspect_ratio must be square or pad, which stock LLaVA can do; "
            f"got {pieces.aspect!r}"
        )
    loaded = _tower(pieces, pieces.layer)
    if pieces.aspect == "pad":
        loaded = LoadedTower(model=loaded.model, image_processor=padding(loaded.image_processor))
    causal = _language_model(pieces)
    tokenizer = _tokenizer(pieces, causal)
    prepare_language_model(causal, tokenizer, str(source))
    parts = compose_loaded(
        loaded,
        causal,
        tokenizer,
        vision_feature_layer=pieces.layer,
        vision_feature_select_strategy=STRATEGIES[pieces.strategy],
    )
    put_projector(parts.stock, pieces.projector, pieces.projector_kind, source)
    scale_as_before(parts.stock, pieces.version)
    return parts


def _language_model(pieces: Pieces) -> PreTrainedModel:
    config = _config_of(pieces.text_config, f"{pieces.source}: the language model")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{pieces.source}: {config.model_type!r} is no causal language model")
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    assert isinstance(kind, type)
    return filled(kind, config, pieces.text_state, f"{pieces.source}: the language model")


def _config_of(tree: Mapping, what: str) -> PreTrainedConfig:
    """Raises ValueError for a type that transformers has no code of its own for."""
    kind = tree.get("model_type")
    if not isinstance(kind, str):
        raise ValueError(f"{what} has a config without model_type: an incomplete download?")
    kept = {k: v for k, v in tree.items() if not k.startswith("_") and k not in ("model_type", "auto_map")}
    try:
        return AutoConfig.for_model(kind, **kept)
    except (KeyError, ValueError):
        raise ValueError(
            f"{what} is of type {kind!r}, which this transformers has no code for; code that comes with a "
            "checkpoint is never run"
        ) from None


def _tokenizer(pieces: Pieces, causal: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The checkpoint's own, with the tokens that its code adds while loading; they must have rows."""
    *others, last = pieces.tokenizers
    name = next((one for one in others if (Path(one) / "tokenizer_config.json").is_file()), last)
    with quiet():
        tokenizer = read_tokenizer(name)
    if missing := [token for token in pieces.added_tokens if token not in tokenizer.get_vocab()]:
        embeddings = causal.get_input_embeddings()
        assert isinstance(embeddings, nn.Embedding)
        rows = embeddings.num_embeddings
        if len(tokenizer) + len(missing) > rows:
            raise ValueError(
                f"{pieces.source} was trained with {', '.join(missing)} around a picture, but its tokenizer "
                f"lacks these tokens, and its {rows} embedding rows have none for them: another model's "
                "tokenizer?"
            )
        tokenizer.add_special_tokens({"additional_special_tokens": missing})
    return tokenizer


def _tower(pieces: Pieces, layer: int) -> LoadedTower:
    if not pieces.tower_state:
        return load_tower(pieces.tower, feature_layer=layer, dtype=torch.float32)
    what = f"{pieces.source}: its own vision tower"
    chosen = tower_source(pieces.tower)
    if chosen.library != "transformers" or chosen.options:
        raise ValueError(
            f"{what} has weights, so --vision_tower gives the image processor alone: a directory or id of "
            f"transformers, without options; got {pieces.tower!r}"
        )
    own = pieces.tower_config
    config = read_config(chosen.name) if own is None else _config_of(own, what)
    if config.model_type in VISION_PARTS:
        config = config.vision_config
    if config.model_type not in FAMILIES:
        raise ValueError(f"{what} is a {config.model_type!r} model; it must be one of {sorted(FAMILIES)}")
    if config.model_type == "siglip_vision_model" and not any("head." in n for n in pieces.tower_state):
        config.vision_use_head = False  # no token passes the pooling head; some training code drops it
    model = filled(FAMILIES[config.model_type].model_class, config, pieces.tower_state, what)
    return LoadedTower(model=model, image_processor=_image_processor(chosen.name, pieces))


def _image_processor(name: str, pieces: Pieces) -> BaseImageProcessor:
    try:
        with quiet(), readable("the image processor of", name):
            return AutoImageProcessor.from_pretrained(name)
    except ValueError as error:
        raise ValueError(
            f"{error}; {pieces.source} has none of its own: give a copy of its tower (a directory with "
            "preprocessor_config.json, or an id) with --vision_tower"
        ) from error
