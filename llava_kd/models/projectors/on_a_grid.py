"""A new student with the connector that reads a grid of visual tokens."""

from __future__ import annotations

import torch

from llava_kd.models.files.checkpoint import Parts
from llava_kd.models.projectors.conv_attention import (
    ConvAttention,
    ConvAttentionConfig,
    ConvAttentionLlava,
    sizes,
)
from llava_kd.models.projectors.replacing import filled, shared
from llava_kd.models.towers.vision_tower import text_config, vision_config


def with_conv_attention(student: Parts, *, seed: int) -> Parts:
    """The student with such a connector, drawn from `seed`, of the parameters that its own projector has.

    Raises ValueError where the tokens of an image are no whole grid: one is dropped, or some have no place.
    """
    grid = student.visual_grid
    if grid.missing or grid.prefix:
        remedy = "set student.vision_feature_select_strategy to full"
        if grid.prefix:
            remedy = "set student.vision_feature_select_strategy to default"
        if grid.prefix > 1 or (grid.prefix and _drops(student)):
            remedy = "take a tower without registers"
        raise ValueError(
            "`student.projector: conv_attention` needs a whole grid of visual tokens, but this tower with "
            f"vision_feature_select_strategy {student.stock.config.vision_feature_select_strategy} gives "
            f"{grid}; {remedy}, or projector to own"
        )
    own = student.stock.config
    found = sizes(vision_config(own).hidden_size, text_config(own).hidden_size)
    config = ConvAttentionConfig(
        **shared(own),
        projector_width=found.width,
        projector_gate_width=found.gate,
        projector_rows=grid.rows,
        projector_columns=grid.columns,
    )
    with torch.device("meta"):
        model = ConvAttentionLlava(config)
    projector = ConvAttention(config).to(student.stock.dtype)
    std = text_config(own).to_dict().get("initializer_range", 0.02)
    projector.draw(torch.Generator().manual_seed(seed), std)
    return Parts(stock=filled(model, student.stock, projector), processor=student.processor)


def _drops(student: Parts) -> bool:
    return student.stock.config.vision_feature_select_strategy == "default"
