"""A model with another projector, all else as it was."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration


def shared(config: LlavaConfig) -> dict[str, Any]:
    """What two LLaVA configurations that differ in the projector alone have in common."""
    return {
        "vision_config": config.vision_config,
        "text_config": config.text_config,
        "image_token_index": config.image_token_index,
        "image_seq_length": config.image_seq_length,
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def filled(
    model: LlavaForConditionalGeneration, source: LlavaForConditionalGeneration, projector: nn.Module
) -> LlavaForConditionalGeneration:
    """`model` with the parts of `source` and this projector."""
    model.model.vision_tower = source.model.vision_tower
    model.model.language_model = source.model.language_model
    model.model.register_module("multi_modal_projector", projector)
    model.set_output_embeddings(source.get_output_embeddings())
    model.tie_weights()
    model.generation_config = source.generation_config
    return model
