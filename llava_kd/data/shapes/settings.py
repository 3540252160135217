"""The two settings of the shapes data, as tables of what differs: scenes, questions, pictures, splits."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from PIL import Image

from llava_kd.data.shapes import questions, scenes
from llava_kd.data.shapes.hard import drawing as hard_drawing
from llava_kd.data.shapes.hard import questions as hard_questions
from llava_kd.data.shapes.hard import scenes as hard_scenes
from llava_kd.data.shapes.questions import Question

Scene = TypeVar("Scene", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class Split(Generic[Scene]):
    """How scenes are made, asked about and drawn; splits of one `stream` take turns at its numbers."""

    stream: str
    scene: Callable[[random.Random], Scene]
    questions: Callable[[Scene, random.Random], list[Question]]
    draw: Callable[[Scene, random.Random], Image.Image]


@dataclass(frozen=True, kw_only=True)
class Setting(Generic[Scene]):
    """`splits` in the order in which they are made, training last; `manifest`: what made the data."""

    types: Sequence[str]
    caption: Callable[[Scene], str]
    splits: Mapping[str, Split[Scene]]
    manifest: Mapping[str, object] = field(default_factory=dict)

    @property
    def tests(self) -> list[str]:
        """The splits that a finished model is scored on."""
        return [name for name in self.splits if name.startswith("test")]


_EASY = Split(stream="scenes", scene=scenes.random_scene, questions=questions.questions, draw=scenes.draw)
EASY = Setting(
    types=questions.TYPES,
    caption=questions.caption,
    splits={"test": _EASY, "validation": _EASY, "train": _EASY},
)


def _hard(name: str, **other: Any) -> Split[hard_scenes.HardScene]:
    usual: dict[str, Any] = {
        "scene": hard_scenes.random_scene,
        "questions": hard_questions.questions,
        "draw": hard_drawing.draw,
    }
    return Split(stream=f"hard {name}", **{**usual, **other})


HARD = Setting(
    types=hard_questions.TYPES,
    caption=hard_questions.caption,
    splits={
        "test": _hard("test"),
        "test_unseen_pairs": _hard(
            "test_unseen_pairs",
            scene=hard_scenes.random_scene_of_unseen_pairs,
            questions=hard_questions.questions_of_unseen_pairs,
        ),
        "test_ood": _hard("test_ood", draw=hard_drawing.draw_otherwise),
        "validation": _hard("validation"),
        "train": _hard("train"),
    },
    manifest={
        "setting": "hard",
        "held_out_pairs": [" ".join(pair) for pair in hard_scenes.HELD_OUT_PAIRS],
    },
)

SETTINGS: Mapping[str, Setting[Any]] = {"easy": EASY, "hard": HARD}
