"""The known kinds of vision towers, one row each; a plug-in passes a longer table.

A row outside this table is stored with its tower: `tell_facts` writes it into the tower's own configuration,
which every checkpoint holds, so that reading the model later needs no table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import (
    Aimv2VisionModel,
    CLIPVisionModel,
    DeiTModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    DINOv3ViTModel,
    IJepaModel,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionModel,
    ViTModel,
)

from llava_kd.models.towers.adapted import AdaptedTower, AdaptedTowerConfig

_FACTS = "llava_kd_family"


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of tower with hidden states [I, N, E]: `num_cls` tokens, then registers, then patches.

    `any_size`: positions are interpolated, so the image size may be any multiple of the patch size.
    """

    model_class: type
    num_cls: int
    any_size: bool = False
    is_stock: bool = True


FAMILIES: Mapping[str, Family] = {
    "siglip_vision_model": Family(model_class=SiglipVisionModel, num_cls=0),
    "clip_vision_model": Family(model_class=CLIPVisionModel, num_cls=1),
    "dinov2": Family(model_class=Dinov2Model, num_cls=1, any_size=True),
    "dinov2_with_registers": Family(model_class=Dinov2WithRegistersModel, num_cls=1, any_size=True),
    "dinov3_vit": Family(model_class=DINOv3ViTModel, num_cls=1, any_size=True),
    "vit": Family(model_class=ViTModel, num_cls=1),
    "deit": Family(model_class=DeiTModel, num_cls=2),
    "ijepa": Family(model_class=IJepaModel, num_cls=0),
    "aimv2_vision_model": Family(model_class=Aimv2VisionModel, num_cls=0),
    AdaptedTowerConfig.model_type: Family(model_class=AdaptedTower, num_cls=0, is_stock=False),
}
# Image-text models whose vision half is one of the families.
VISION_PARTS = ("siglip", "clip", "aimv2")


def tell_facts(config: PreTrainedConfig, family: Family) -> None:
    """Write a row that is not of this table into the configuration of its tower."""
    if config.model_type not in FAMILIES:
        config.update({_FACTS: {"num_cls": family.num_cls, "any_size": family.any_size}})


def own_facts(config: PreTrainedConfig) -> Family | None:
    """The row in a tower's own configuration; None if it has none."""
    facts = config.to_dict().get(_FACTS)
    if not isinstance(facts, dict):
        return None
    return Family(model_class=PreTrainedModel, is_stock=False, **facts)
