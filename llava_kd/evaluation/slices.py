"""Score a live model on a few records while it trains."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from llava_kd.evaluation.generation.generate import Generator, batches_by_length, evaluation_mode
from llava_kd.evaluation.generation.questions import Question, read_llava_json
from llava_kd.evaluation.scorers.exact import is_correct


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Named questions that are asked every so many steps."""

    name: str
    questions: Sequence[Question]


def read_slice(
    name: str,
    path: str | Path,
    *,
    count: int | None = None,
    image_root: str | Path | None = None,
    follow_symlinks: bool = False,
) -> Slice:
    """The first `count` records of a LLaVA JSON file as a slice."""
    questions = read_llava_json(path, image_root=image_root, follow_symlinks=follow_symlinks)
    return Slice(name=name, questions=questions[:count])


def score_slices(
    stock: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    slices: Sequence[Slice],
    *,
    rank: int = 0,
    world_size: int = 1,
    batch_size: int = 32,
    max_new_tokens: int = 16,
    is_sharded: bool = False,
) -> dict[str, float]:
    """Exact-match accuracy of each slice, named "slice/NAME", and "slice/seconds", for the log.

    Every rank calls it and answers its part; all get the same figures. With `is_sharded` every rank runs
    the same number of forwards, as parameters that are gathered on use need. The modes of the model's modules
    are left as they were.
    """
    start = time.perf_counter()
    generator = Generator(stock, processor, max_new_tokens=max_new_tokens, early_stop=not is_sharded)
    figures: dict[str, float] = {}
    with evaluation_mode(stock):
        for part in slices:
            mine = _share(part.questions, rank, world_size, is_even=is_sharded)
            right: dict[str, bool] = {}
            for batch in batches_by_length(mine, batch_size):
                texts = generator.answer(batch)
                for question, text in zip(batch, texts, strict=True):
                    right[question.id] = is_correct(text, question.truth)
            figures[f"slice/{part.name}"] = _mean_over_ranks(right, world_size)
    figures["slice/seconds"] = time.perf_counter() - start
    return figures


def _share(questions: Sequence[Question], rank: int, world_size: int, *, is_even: bool) -> list[Question]:
    """This rank's questions; with `is_even` some are asked on two ranks, so that all have as many."""
    mine = list(questions[rank::world_size])
    while is_even and len(mine) < math.ceil(len(questions) / world_size):
        mine.append(questions[0])
    return mine


def _mean_over_ranks(right: Mapping[str, bool], world_size: int) -> float:
    """Share of right answers over the questions of all ranks, each counted once."""
    everywhere: list[Mapping[str, bool] | None] = [right]
    if world_size > 1:
        everywhere = [None] * world_size
        dist.all_gather_object(everywhere, right)
    merged: dict[str, bool] = {}
    for part in everywhere:
        merged |= part or {}
    return sum(merged.values()) / len(merged) if merged else 0.0
