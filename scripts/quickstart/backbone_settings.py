"""What is made for each setting of the shapes data: sizes of the models, and what a patch names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from backbone_labels import EASY_LABELS, HARD_LABELS, easy_labels, hard_labels

from llava_kd.data.shapes.settings import SETTINGS as SHAPES
from llava_kd.data.shapes.settings import Setting


@dataclass(frozen=True, kw_only=True)
class TowerSize:
    image_size: int
    patch_size: int
    width: int
    mlp_width: int
    layers: int
    heads: int

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size


@dataclass(frozen=True, kw_only=True)
class LlmSize:
    vocab_rows: int
    width: int
    layers: int
    heads: int
    mlp_width: int


@dataclass(frozen=True, kw_only=True)
class BackboneSetting:
    """`labels`: what a patch is asked for, and how many values that has; `patch_labels` answers."""

    shapes: Setting[Any]
    tower: TowerSize
    tower_steps: int
    tower_pictures: int
    labels: Mapping[str, int]
    patch_labels: Callable[[Any, int], list[list[int]]]
    vocab_size: int
    llms: Mapping[str, LlmSize]


# The teacher has padding rows that the student has not, as Qwen2.5 7B against 0.5B. vLLM on a CPU serves no
# head of 24; a student with 3 heads of 32 was tried, and learned from its teacher no more than without.
SETTINGS = {
    "easy": BackboneSetting(
        shapes=SHAPES["easy"],
        tower=TowerSize(image_size=48, patch_size=8, width=96, mlp_width=256, layers=4, heads=4),
        tower_steps=1000,
        tower_pictures=6000,
        labels=EASY_LABELS,
        patch_labels=easy_labels,
        vocab_size=448,
        llms={
            "teacher": LlmSize(vocab_rows=512, width=128, layers=4, heads=4, mlp_width=384),
            "student": LlmSize(vocab_rows=448, width=96, layers=3, heads=4, mlp_width=288),
        },
    ),
    "hard": BackboneSetting(
        shapes=SHAPES["hard"],
        tower=TowerSize(image_size=96, patch_size=12, width=128, mlp_width=384, layers=4, heads=4),
        tower_steps=3000,  # after 1000 steps on 6000 pictures, one label in five is read wrongly
        tower_pictures=24000,
        labels=HARD_LABELS,
        patch_labels=hard_labels,
        vocab_size=576,
        llms={
            "teacher": LlmSize(vocab_rows=640, width=192, layers=5, heads=6, mlp_width=512),
            "student": LlmSize(vocab_rows=576, width=96, layers=3, heads=4, mlp_width=288),
        },
    ),
}
