"""Answers of the student to the records of an optimiser step, whoever writes them.

Shape legend: I images, C channels, H height, W width, N new tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

import torch
from torch import Tensor

from llava_kd.batch import Batch
from llava_kd.distill.teaching.on_policy.talks import Talk, talks_of, with_answers
from llava_kd.distill.teaching.pictures.draws import generator_of
from llava_kd.training.trainer import Loader

_ZERO = {
    "own_answers_written": 0.0,
    "own_answers_cut": 0.0,
    "own_answers_empty": 0.0,
    "own_answer_tokens": 0.0,
    "own_answers_s": 0.0,
}
Take = Callable[[Talk, Tensor], None]


@dataclass
class Asked:
    """A talk of a step, the pictures of its record, and the record's place among those of this rank."""

    talk: Talk
    pixels_ICHW: Tensor
    place: int


class Hand(Protocol):
    """Who writes. Every rank has its own, and all of them write at the same steps."""

    @property
    def end_ids(self) -> Sequence[int]:
        """Any of these tokens ends an answer."""
        ...

    def answer(self, asked: Sequence[Asked], step: int, take: Take) -> Mapping[str, float]:
        """Every turn of these talks, each given to `take`; figures of how it was done.

        What stands behind the first end of an answer does not count.
        """
        ...


@dataclass
class Writer:
    """Lays what `hand` writes into a step's micro-batches. `counted` are sums since it was last set back.

    `row_tokens` is how many tokens a row of several records may have.
    """

    hand: Hand
    max_length: int
    row_tokens: int | None = None
    counted: dict[str, float] = field(default_factory=lambda: dict(_ZERO))
    _told: dict[str, float] = field(default_factory=dict)

    def rewritten(self, batches: Sequence[Batch], step: int) -> list[Batch]:
        """The micro-batches of this rank with the student's answers."""
        start = time.perf_counter()
        talks = [talks_of(batch, max_length=self.max_length) for batch in batches]
        places = count()
        asked = [
            Asked(talk, pixels_ICHW, next(places))
            for batch, its in zip(batches, talks, strict=True)
            for talk, pixels_ICHW in _with_pictures(batch, its)
        ]
        self._told = dict(self.hand.answer([one for one in asked if one.talk.room], step, self._take))
        self.counted["own_answers_s"] += time.perf_counter() - start
        return [
            with_answers(batch, its, row_tokens=self.row_tokens)
            for batch, its in zip(batches, talks, strict=True)
        ]

    def figures(self) -> dict[str, float]:
        """Counts since the last call, and what the hand said of its last step."""
        counted, self.counted = self.counted, dict(_ZERO)
        if (written := counted["own_answers_written"]) == 0:
            return counted
        return {**counted, "own_answers_cut_share": counted["own_answers_cut"] / written, **self._told}

    def _take(self, talk: Talk, ids_N: Tensor) -> None:
        """The answer, up to its end."""
        places = torch.isin(ids_N, torch.tensor(self.hand.end_ids)).nonzero().squeeze(1).tolist()
        answer_N = ids_N[: places[0] + 1] if places else ids_N
        is_cut = talk.answer(answer_N, is_ended=bool(places))
        self.counted["own_answers_written"] += 1
        self.counted["own_answers_cut"] += is_cut
        self.counted["own_answers_empty"] += places[:1] == [0]
        self.counted["own_answer_tokens"] += len(answer_N)


def _with_pictures(batch: Batch, talks: Sequence[Talk]) -> Iterator[tuple[Talk, Tensor]]:
    """Of each record its images, in the order of their places: all of them stand in its first prompts."""
    inputs = batch.student
    per_image = len(inputs.places.visual_N) // max(inputs.num_images, 1)
    numbers = [talk.num_visual // max(per_image, 1) for talk in talks]
    return zip(talks, inputs.pixels_ICHW.split(numbers), strict=True)


class OwnAnswersLoader:
    """The loader's batches, at a share of the steps with the student's answers: as it is when they are taken.

    The trainer takes a step's batches when the step before is done, and reads nothing ahead.
    """

    def __init__(self, loader: Loader, writer: Writer, *, share: float, seed: int) -> None:
        self._loader, self._writer, self._share, self._seed = loader, writer, share, seed

    def is_own(self, step: int) -> bool:
        """Drawn by the seed and the step: the same on every rank, and when a run goes on."""
        return bool(generator_of(self._seed, step, "own answers").random() < self._share)

    def batches(self, first_step: int, last_step: int) -> Iterator[list[Batch]]:
        for step, batches in enumerate(self._loader.batches(first_step, last_step), start=first_step):
            yield self._writer.rewritten(batches, step) if self.is_own(step) else batches

    def telemetry(self) -> dict[str, float]:
        """The loader's own, and this rank's counts of answers."""
        return {**self._loader.telemetry(), **self._writer.figures()}
