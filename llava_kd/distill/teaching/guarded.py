"""Any teaching, with a policy for private tokens beside what it says.

Shape legend: I images, N tokens of an image, E tower width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from llava_kd.batch import Batch, Counts
from llava_kd.distill.taught import Taught
from llava_kd.distill.teaching.door import Around, Teaching
from llava_kd.distill.token_policy import TokenPolicy
from llava_kd.models.mllm import Prediction

PRIVATE = "private_share"


class Guarded(Around):
    """Answers as `inner` does. The policy joins inside the forward, where nothing can leave it out again."""

    def __init__(self, inner: Teaching, policy: TokenPolicy) -> None:
        super().__init__(inner)
        self._policy = policy

    def inside(self, batch: Batch, student: Prediction, features_INE: Tensor, taught: Taught) -> Taught:
        said = self._inner.inside(batch, student, features_INE, taught)
        return replace(said, policy=self._policy.of(batch))

    def figures(self, batch: Batch, taught: Taught, counts: Counts) -> Mapping[str, Tensor]:
        """With the mean score of the response tokens."""
        score = batch.student.target_scores_N.sum() / counts["response_tokens"].clamp_min(1).float()
        return {**self._inner.figures(batch, taught, counts), PRIVATE: score}

    def advice(self, means: Mapping[str, Tensor]) -> str | None:
        """None where labels are masked: the student's mean then leaves out what the teacher's counts."""
        if self._policy.cross_entropy < 1 and PRIVATE in means and bool(means[PRIVATE] > 0):
            return None
        return self._inner.advice(means)
