"""Answers of the student as it is, in batches, to the records of an optimiser step.

Shape legend: B records answered at once, T tokens (left-padded), I images, C channels, H height, W width,
N new tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llava_kd.batch import Batch
from llava_kd.distill.teaching.on_policy.talks import Talk, talks_of, with_answers
from llava_kd.distill.teaching.pictures.draws import generator_of
from llava_kd.evaluation.generation.generate import Generator, evaluation_mode
from llava_kd.evaluation.generation.turns import Turns
from llava_kd.training.trainer import Loader

_ZERO = {
    "own_answers_written": 0.0,
    "own_answers_cut": 0.0,
    "own_answers_empty": 0.0,
    "own_answer_tokens": 0.0,
    "own_answers_s": 0.0,
}


@dataclass
class Asked:
    """A talk of a step, and the pictures of its row."""

    talk: Talk
    pixels_ICHW: Tensor


@dataclass
class Writer:
    """Writes with `generator`, whose model is the student itself; `inference` lets it be called by itself.

    Each token is drawn by the step, the record and the turn: neither the cut into micro-batches nor the ranks
    decide it, up to the rounding of the logits. Every rank writes for its own records. `counted` are sums
    since it was last set back.
    """

    generator: Generator
    inference: Callable[[], AbstractContextManager[None]]
    max_length: int
    batch_size: int
    counted: dict[str, float] = field(default_factory=lambda: dict(_ZERO))

    def rewritten(self, batches: Sequence[Batch], step: int) -> list[Batch]:
        """The micro-batches of this rank with the student's answers."""
        start = time.perf_counter()
        talks = [talks_of(batch, max_length=self.max_length) for batch in batches]
        asked = [one for batch, its in zip(batches, talks, strict=True) for one in _with_pictures(batch, its)]
        with self.inference(), evaluation_mode(self.generator.model):
            # Those that end together; of them those of similar length, and else in the order of the step.
            asked = sorted(
                (one for one in asked if one.talk.room),
                key=lambda one: (one.talk.num_to_come, len(one.talk.prompt.ids)),
                reverse=True,
            )
            for first in range(0, len(asked), self.batch_size):
                self._answer(asked[first : first + self.batch_size], step)
        self.counted["own_answers_s"] += time.perf_counter() - start
        return [with_answers(batch, its) for batch, its in zip(batches, talks, strict=True)]

    def _answer(self, asked: Sequence[Asked], step: int) -> None:
        """Every turn of these talks."""
        talks = [one.talk for one in asked]
        try:
            turns = Turns(self.generator, [one.pixels_ICHW for one in asked])
            while which := [k for k, talk in enumerate(talks) if talk.room]:
                prompts = [talks[k].prompt for k in which]
                names = [f"{step} {talks[k].turn} {talks[k].name}" for k in which]
                ids_BN = turns.written(which, [(one.ids, one.visual) for one in prompts], names).cpu()
                for k, ids_N in zip(which, ids_BN, strict=True):
                    self._take(talks[k], ids_N)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"answering {len(asked)} records at once needs more memory than there is beside training; "
                "lower on_policy.batch_size, and the same command goes on from the last checkpoint"
            ) from error

    def _take(self, talk: Talk, ids_N: Tensor) -> None:
        """The answer, up to its end."""
        places = torch.isin(ids_N, torch.tensor(self.generator.end_ids)).nonzero().squeeze(1).tolist()
        answer_N = ids_N[: places[0] + 1] if places else ids_N
        is_cut = talk.answer(answer_N, is_ended=bool(places))
        self.counted["own_answers_written"] += 1
        self.counted["own_answers_cut"] += is_cut
        self.counted["own_answers_empty"] += places[:1] == [0]
        self.counted["own_answer_tokens"] += len(answer_N)


def _with_pictures(batch: Batch, talks: Sequence[Talk]) -> Iterator[Asked]:
    inputs = batch.student
    per_image = len(inputs.places.visual_N) // max(inputs.num_images, 1)
    images_B = inputs.visual_BT.sum(1).cpu() // max(per_image, 1)
    for talk, pixels_ICHW in zip(talks, inputs.pixels_ICHW.split(images_B.tolist()), strict=True):
        yield Asked(talk, pixels_ICHW)


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
        counted, self._writer.counted = self._writer.counted, dict(_ZERO)
        shares = {}
        if (written := counted["own_answers_written"]) > 0:
            shares["own_answers_cut_share"] = counted["own_answers_cut"] / written
        return {**self._loader.telemetry(), **counted, **shares}
