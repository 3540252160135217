"""The hidden states of a tower by their number: a ConvNet's stages, as maps of other sizes and widths.

Numbers count as `vision_feature_layer` does, from the front: with timm's ConvNets 0 is the first stage, with
transformers' models it is what goes into the first.

Shape legend: I images, M tokens of a stage, N visual tokens of an image, E width of the stage.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import LlavaConfig, PreTrainedModel

from llava_kd.models.towers.vision_tower import feature_layer, tower_states, vision_config
from llava_kd.models.towers.visual_grid import VisualGrid, resample

STAGE = "vision_tower.hidden_states."  # how the tap of a stage begins; its number follows


def stage_number(path: str) -> int | None:
    """Of a tap; None for a tap of anything else. ValueError where no number follows."""
    if not path.startswith(STAGE):
        return None
    number = path.removeprefix(STAGE)
    if not number.isdecimal():
        raise ValueError(f"a stage of the tower is {STAGE} and its number, from 0; got {path!r}")
    return int(number)


def without_weights(tower: PreTrainedModel, config: LlavaConfig) -> tuple[nn.Module, Tensor]:
    """A copy of a tower without memory, and a picture for it: what depends on what can be asked of it."""
    with torch.device("meta"):
        ghost = nn.Module.to(type(tower)(tower.config), "meta")
        size = vision_config(config).image_size
        return ghost, torch.zeros(1, 3, size, size)


@torch.no_grad()
def stage_widths(tower: PreTrainedModel, config: LlavaConfig, numbers: Iterable[int]) -> dict[int, int]:
    """How wide each of these stages is; no weight is used.

    Raises ValueError for one that the tower has not, or that the features are not made from.
    """
    if not (numbers := list(numbers)):
        return {}
    ghost, pixels_ICHW = without_weights(tower, config)
    widths = [state.shape[2] for state in tower_states(ghost, pixels_ICHW)]
    last = feature_layer(config) % len(widths)
    for number in numbers:
        if number >= len(widths):
            raise ValueError(
                f"stage {number} is deeper than the tower: this {vision_config(config).model_type!r} has "
                f"hidden states 0 to {len(widths) - 1}"
            )
        if number > last:
            raise ValueError(
                f"stage {number} lies behind hidden state {last}, which the student reads "
                f"(vision_feature_layer {feature_layer(config)}): training it would change nothing; take 0 "
                f"to {last}"
            )
    return {number: widths[number] for number in numbers}


def on_visual_tokens(states_IME: Tensor, *, prefix: int, target: VisualGrid) -> Tensor:
    """[I, N, E]: a stage's map on the grid of the visual tokens, averaged where it is finer.

    `prefix` tokens (CLS, registers) come before the map and are left out; it has the target's proportions.
    """
    patches_IME = states_IME[:, prefix:]
    scale = (patches_IME.shape[1] / (target.rows * target.columns)) ** 0.5
    source = VisualGrid(rows=round(target.rows * scale), columns=round(target.columns * scale))
    if source.num_tokens != patches_IME.shape[1]:
        raise ValueError(
            f"a stage of the tower has {patches_IME.shape[1]} tokens, which is no grid of the proportions "
            f"{target.rows} x {target.columns}"
        )
    return resample(patches_IME, source=source, target=target)


def check_tokens(target: VisualGrid) -> None:
    """ValueError where visual tokens have no place on the map of a stage."""
    if target.prefix:
        raise ValueError(
            f"a stage of the tower is a map, and the student's visual tokens begin with {target.prefix} "
            "prefix tokens (CLS, registers), which have no place on it: set vision_feature_select_strategy "
            "to default, or take a tower without registers"
        )
