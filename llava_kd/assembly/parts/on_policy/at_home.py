"""Answers of the student as it is, in batches, beside its training.

Shape legend: B records answered at once, N new tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from llava_kd.assembly.parts.on_policy.writer import Asked, Take
from llava_kd.evaluation.generation.generate import Generator, evaluation_mode
from llava_kd.evaluation.generation.turns import Turns


@dataclass
class AtHome:
    """Writes with `generator`, whose model is the student itself; `inference` lets it be called by itself.

    Each token is drawn by the step, the record and the turn: neither the cut into micro-batches nor the ranks
    decide it, up to the rounding of the logits. Every rank writes for its own records.
    """

    generator: Generator
    inference: Callable[[], AbstractContextManager[None]]
    batch_size: int

    @property
    def end_ids(self) -> Sequence[int]:
        return self.generator.end_ids

    def answer(self, asked: Sequence[Asked], step: int, take: Take) -> Mapping[str, float]:
        # Those that end together; of them those of similar length, and else in the order of the step.
        asked = sorted(asked, key=lambda one: (one.talk.num_to_come, len(one.talk.prompt.ids)), reverse=True)
        with self.inference(), evaluation_mode(self.generator.model):
            for first in range(0, len(asked), self.batch_size):
                self._answer(asked[first : first + self.batch_size], step, take)
        return {}

    def _answer(self, asked: Sequence[Asked], step: int, take: Take) -> None:
        """Every turn of these talks."""
        talks = [one.talk for one in asked]
        try:
            turns = Turns(self.generator, [one.pixels_ICHW for one in asked])
            while which := [k for k, talk in enumerate(talks) if talk.room]:
                prompts = [talks[k].prompt for k in which]
                names = [f"{step} {talks[k].turn} {talks[k].name}" for k in which]
                ids_BN = turns.written(which, [(one.ids, one.visual) for one in prompts], names).cpu()
                for k, ids_N in zip(which, ids_BN, strict=True):
                    take(talks[k], ids_N)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"there is not enough memory to answer {len(asked)} records at once during training; lower "
                "on_policy.batch_size, then run the same command again to continue from the last "
                "checkpoint"
            ) from error
