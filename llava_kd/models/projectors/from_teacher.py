"""A student that takes its teacher's projector over, and its function as a stock model where one exists."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from llava_kd.models.files.checkpoint import Parts
from llava_kd.models.projectors.conv_attention import ConvAttentionLlava
from llava_kd.models.projectors.replacing import filled, shared
from llava_kd.models.projectors.reused import ReusedProjector, ReusedProjectorConfig, ReusedProjectorLlava
from llava_kd.models.towers.vision_tower import text_config, tower_fingerprint


def with_teacher_projector(student: Parts, teacher: Parts, *, seed: int) -> Parts:
    """The student with the teacher's projector and a random linear map, drawn from `seed`, to its own width.

    Raises ValueError if the towers differ, for then the projector would read what it has not learned.
    """
    if isinstance(teacher.stock, ReusedProjectorLlava):
        raise ValueError("the teacher's own projector is a reused one; take the teacher that it came from")
    if isinstance(teacher.stock, ConvAttentionLlava):
        raise ValueError(
            "`student.projector` is teacher, but the teacher's is conv_attention, which cannot be reused: "
            "only two linear layers can; set projector to own, or to conv_attention"
        )
    prints = [
        tower_fingerprint(
            parts.stock.model.vision_tower,
            parts.stock.config,
            parts.processor.image_processor.to_dict(),
            dtype=torch.bfloat16,
        )
        for parts in (student, teacher)
    ]
    if prints[0] != prints[1]:
        raise ValueError(
            "`student.projector` is teacher, but the towers differ in weights, settings, preprocessing, "
            "layer or strategy, so the teacher's projector cannot read the student's features; set "
            "student.vision_tower, vision_feature_layer and vision_feature_select_strategy to the teacher's"
        )
    theirs = teacher.stock.config
    config = ReusedProjectorConfig(
        **shared(student.stock.config),
        projector_hidden_act=theirs.projector_hidden_act,
        multimodal_projector_bias=theirs.multimodal_projector_bias,
        projector_hidden_size=text_config(theirs).hidden_size,
    )
    with torch.device("meta"):
        model = ReusedProjectorLlava(config)
    projector = ReusedProjector(config)
    source = teacher.stock.model.multi_modal_projector
    projector.linear_1.load_state_dict(source.linear_1.state_dict())
    projector.linear_2.load_state_dict(source.linear_2.state_dict())
    bound = 1 / math.sqrt(projector.width_map.in_features)
    generator = torch.Generator().manual_seed(seed)
    nn.init.uniform_(projector.width_map.weight, -bound, bound, generator=generator)
    nn.init.zeros_(projector.width_map.bias)
    return Parts(stock=filled(model, student.stock, projector), processor=student.processor)


def folded(parts: Parts, name: str) -> Parts:
    """The same function with a stock projector: the map folded into the second layer, zeros for the rest.

    A model with a stock projector is returned as it is. Raises ValueError where the reused projector is wider
    inside than stock LLaVA allows.
    """
    model = parts.stock
    if not isinstance(model, ReusedProjectorLlava):
        return parts
    reused = model.model.multi_modal_projector
    assert isinstance(reused, ReusedProjector)
    inner, width = reused.width_map.in_features, reused.width_map.out_features
    if inner > width:
        raise ValueError(
            f"{name} has the projector of its teacher, {inner} wide inside; stock LLaVA's is as wide as the "
            f"language model, {width}, so no stock export is possible. It loads where llava_kd is installed, "
            "after `import llava_kd.models.projectors.reused`; or train a student with projector: own"
        )
    config = LlavaConfig(
        **shared(model.config),
        projector_hidden_act=model.config.projector_hidden_act,
        multimodal_projector_bias=True,
    )
    with torch.device("meta"):
        stock = LlavaForConditionalGeneration(config)
    projector = stock.model.multi_modal_projector.to_empty(device="cpu").to(reused.width_map.weight.dtype)
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.zero_()
        projector.linear_1.weight[:inner] = reused.linear_1.weight
        second, carry = reused.linear_2, reused.width_map
        projector.linear_2.weight[:, :inner] = (carry.weight.double() @ second.weight.double()).to(
            carry.weight
        )
        projector.linear_2.bias.copy_(carry.bias)
        if reused.linear_1.bias is not None:
            projector.linear_1.bias[:inner] = reused.linear_1.bias
            projector.linear_2.bias.add_((carry.weight.double() @ second.bias.double()).to(carry.weight))
    return Parts(stock=filled(stock, model, projector), processor=parts.processor)
