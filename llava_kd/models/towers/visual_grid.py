"""Where the visual tokens of an image lie, and features carried from one grid to another.

Shape legend: I images, M tokens of the source, N tokens of the target, E width, R and C rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import LlavaConfig

from llava_kd.models.towers.vision_tower import grid, num_prefix_tokens


@dataclass(frozen=True, kw_only=True)
class VisualGrid:
    """`prefix` tokens (CLS, registers), then the patches row by row, less the first `missing` (0 or 1)."""

    rows: int
    columns: int
    prefix: int = 0
    missing: int = 0

    @property
    def num_tokens(self) -> int:
        return self.prefix + self.rows * self.columns - self.missing

    def __str__(self) -> str:
        before = f"{self.prefix} prefix and " if self.prefix else ""
        less = " less the first" if self.missing else ""
        return f"{self.num_tokens} visual tokens an image ({before}{self.rows} x {self.columns}{less})"


def visual_grid(config: LlavaConfig, image_size: tuple[int, int] | None = None) -> VisualGrid:
    """Strategy `default` drops the first token: a prefix token, or the first patch of a tower without."""
    rows, columns = grid(config, image_size)
    prefix = num_prefix_tokens(config)
    dropped = int(config.vision_feature_select_strategy == "default")
    from_prefix = min(dropped, prefix)
    return VisualGrid(rows=rows, columns=columns, prefix=prefix - from_prefix, missing=dropped - from_prefix)


def check_resample(
    source: VisualGrid, target: VisualGrid, *, onto: Literal["student", "teacher"] = "student"
) -> None:
    """ValueError where the target, the grid of the side `onto`, has prefix tokens that the source lacks."""
    if target.prefix in (0, source.prefix):
        return
    other, remedy = "student", "take a tower with as many for the student, or drop visual_switch"
    if onto == "student":
        without = "set the student's vision_feature_select_strategy to default"
        if target.prefix > 1:
            without = "take a tower without registers for the student"
        other, remedy = "teacher", f"{without}, or drop visual_kl, relation and attention"
    raise ValueError(
        f"the {onto} has {target.prefix} prefix tokens (CLS, registers) before its patches and the {other} "
        f"{source.prefix}: only as many, or none, can be resampled; {remedy}"
    )


def resample(features_IME: Tensor, *, source: VisualGrid, target: VisualGrid) -> Tensor:
    """Features [I, N, E] at the target's tokens: bilinear between patch centres, averaging where it shrinks.

    Equal grids give the same numbers back. A missing first patch of the source takes its right neighbour's
    value. Prefix tokens are carried over where both sides have as many, left out where the target has none.
    """
    if source == target:
        return features_IME
    check_resample(source, target)
    num_images, _, width = features_IME.shape
    if num_images == 0:
        return features_IME.new_zeros(0, target.num_tokens, width)
    prefix_IPE = features_IME[:, : target.prefix]
    patches_IME = features_IME[:, source.prefix :]
    if source.missing:
        patches_IME = torch.cat([patches_IME[:, :1], patches_IME], dim=1)
    maps_IERC = patches_IME.transpose(1, 2).unflatten(2, (source.rows, source.columns))
    if (source.rows, source.columns) != (target.rows, target.columns):
        maps_IERC = torch.nn.functional.interpolate(
            maps_IERC.float(),
            size=(target.rows, target.columns),
            mode="bilinear",
            align_corners=False,
            antialias=True,
        ).to(features_IME.dtype)
    patches_INE = maps_IERC.flatten(2).transpose(1, 2)[:, target.missing :]
    return torch.cat([prefix_IPE, patches_INE], dim=1)
