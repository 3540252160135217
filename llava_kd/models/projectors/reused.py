"""The teacher's projector, frozen, inside a student: CompoDistill's teacher adapter fetch (arXiv 2510.12184).

The teacher's two linear layers keep its width; a trained linear map carries their output to the student's.
Stock LLaVA's projector is as wide inside as its language model, so such a student has a class of its own;
importing this file is all that `from_pretrained` needs to read one.

Shape legend: I images, N tokens of an image, E tower width, H teacher width, D student width.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration
from transformers.activations import ACT2FN

from llava_kd.models.towers.vision_tower import text_config, vision_config


class ReusedProjectorConfig(LlavaConfig):
    """A LLaVA whose projector is `projector_hidden_size` wide inside."""

    model_type = "llava_kd_reused_projector"

    projector_hidden_size: int = 4096


class ReusedProjector(nn.Module):
    """`linear_1` and `linear_2` are the teacher's and frozen; `width_map` is trained."""

    def __init__(self, config: ReusedProjectorConfig) -> None:
        super().__init__()
        inner, has_bias = config.projector_hidden_size, config.multimodal_projector_bias
        self.linear_1 = nn.Linear(vision_config(config).hidden_size, inner, bias=has_bias)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(inner, inner, bias=has_bias)
        self.width_map = nn.Linear(inner, text_config(config).hidden_size)

    def forward(self, features_INE: Tensor) -> Tensor:
        return self.width_map(self.linear_2(self.act(self.linear_1(features_INE))))


class ReusedProjectorLlava(LlavaForConditionalGeneration):
    """A stock LLaVA in all but the projector."""

    config_class = ReusedProjectorConfig

    def __init__(self, config: ReusedProjectorConfig) -> None:
        super().__init__(config)
        self.model.multi_modal_projector = ReusedProjector(config)  # pyright: ignore[reportAttributeAccessIssue]
        self.post_init()


AutoConfig.register(ReusedProjectorConfig.model_type, ReusedProjectorConfig)
AutoModelForImageTextToText.register(ReusedProjectorConfig, ReusedProjectorLlava)
