"""Any teaching, over answers of which some are the student's own: no label of these is learned.

Shape legend: I images, N tokens of an image or response targets, E tower width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from llava_kd.batch import Batch, Counts
from llava_kd.distill.taught import LABELLED, Taught
from llava_kd.distill.teaching.door import Around
from llava_kd.models.mllm import Prediction

OWN = "own_answers"


class OwnAnswers(Around):
    """Answers as `inner` does, but that the tokens of `Batch.own_answers` count in no cross-entropy."""

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """With the labels that count, which is what cross-entropy is divided by."""
        places_N = batch.student.places.response_N
        number = 0.0 if batch.own_answers else float(len(places_N))
        labelled = torch.full((), number, dtype=torch.float64, device=places_N.device)
        return {**self._inner.counts(batch), LABELLED: labelled}

    def inside(self, batch: Batch, student: Prediction, features_INE: Tensor, taught: Taught) -> Taught:
        said = self._inner.inside(batch, student, features_INE, taught)
        if not batch.own_answers:
            return said
        places_N = batch.student.places.response_N
        return replace(said, label_weight_N=torch.zeros(len(places_N), device=places_N.device))

    def losses(
        self, batch: Batch, student: Prediction, taught: Taught, counts: Counts
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """With the share of the step's response tokens that the student wrote: 0 or 1."""
        zero = torch.zeros((), device=student.hidden_BTD.device)
        loss, means = self._inner.losses(batch, student, taught, counts) or (zero, {})
        own = zero + float(batch.own_answers) * len(batch.student.places.response_N)
        return loss, {**means, OWN: own / counts["response_tokens"].clamp_min(1).float()}

    def advice(self, means: Mapping[str, Tensor]) -> str | None:
        """None of a step without labels: there is no cross-entropy to hold the teacher's against."""
        if OWN in means and bool(means[OWN] > 0):
            return None
        return self._inner.advice(means)
