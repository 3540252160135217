"""Questions that the student answers while it trains."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch

from llava_kd.config import EvaluateConfig, TrainConfig
from llava_kd.evaluation.generation.questions import check_images
from llava_kd.evaluation.slices import Slice, read_slice, score_slices
from llava_kd.models.files.checkpoint import Parts
from llava_kd.parallel.engine import Engine


def read_slices(config: TrainConfig) -> list[Slice]:
    """Raises ValueError for a file that cannot be read, and for images that are not there."""
    if config.evaluate is None:
        return []
    follow = config.data.follow_symlinks
    slices = [
        read_slice(name, part.data, count=part.num_questions, image_root=part.images, follow_symlinks=follow)
        for name, part in config.evaluate.slices.items()
    ]
    for part in slices:
        check_images(part.questions)
    return slices


def slice_scorer(
    config: EvaluateConfig, slices: Sequence[Slice], student: Parts, engine: Engine
) -> Callable[[], Mapping[str, float]]:
    """A call scores the student as it is now; every rank must make it."""
    # Its own: the loader's thread reads ahead with the student's tokenizer, whose padding is a state of it.
    processor = copy.deepcopy(student.processor)

    def score() -> Mapping[str, float]:
        try:
            with engine.inference():
                return score_slices(
                    student.stock,
                    processor,
                    slices,
                    rank=engine.world.rank,
                    world_size=engine.world.size,
                    batch_size=config.batch_size,
                    max_new_tokens=config.max_new_tokens,
                    is_sharded=engine.is_sharded,
                )
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"there is not enough memory to answer {config.batch_size} questions at once during "
                "training; lower evaluate.batch_size, then run the same command again to continue from "
                "the last checkpoint"
            ) from error

    return score
