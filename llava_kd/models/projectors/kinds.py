"""Which class reads a checkpoint, by its projector; only the first of them is stock."""

from __future__ import annotations

from transformers import LlavaConfig, LlavaForConditionalGeneration

from llava_kd.models.projectors.conv_attention import ConvAttentionConfig, ConvAttentionLlava
from llava_kd.models.projectors.reused import ReusedProjectorConfig, ReusedProjectorLlava

CLASSES: dict[str, type[LlavaForConditionalGeneration]] = {
    LlavaConfig.model_type: LlavaForConditionalGeneration,
    ReusedProjectorConfig.model_type: ReusedProjectorLlava,
    ConvAttentionConfig.model_type: ConvAttentionLlava,
}


def llava_class(config: LlavaConfig) -> type[LlavaForConditionalGeneration]:
    """What reads a checkpoint of this configuration."""
    return CLASSES.get(config.model_type, LlavaForConditionalGeneration)
