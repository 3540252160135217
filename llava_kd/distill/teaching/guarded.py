"""Any teaching, with a policy for private tokens beside what it says.

Shape legend: I images, N tokens of an image, E tower width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from llava_kd.batch import Batch, Counts
from llava_kd.distill.taught import Taught
from llava_kd.distill.teaching.door import Teaching
from llava_kd.distill.token_policy import TokenPolicy
from llava_kd.models.mllm import Prediction

PRIVATE = "private_share"


class Guarded(Teaching):
    """Answers as `inner` does. The policy joins inside the forward, where nothing can leave it out again."""

    def __init__(self, inner: Teaching, policy: TokenPolicy) -> None:
        self._inner, self._policy = inner, policy
        self.changes_pictures = inner.changes_pictures

    def modules(self) -> nn.Module | None:
        return self._inner.modules()

    def outside(self, batch: Batch, features_INE: Tensor | None) -> Taught:
        return self._inner.outside(batch, features_INE)

    def pictures(self, batch: Batch) -> Batch:
        return self._inner.pictures(batch)

    def inside(self, batch: Batch, student: Prediction, features_INE: Tensor, taught: Taught) -> Taught:
        said = self._inner.inside(batch, student, features_INE, taught)
        return replace(said, policy=self._policy.of(batch))

    def losses(
        self, batch: Batch, student: Prediction, taught: Taught, counts: Counts
    ) -> tuple[Tensor, Mapping[str, Tensor]] | None:
        return self._inner.losses(batch, student, taught, counts)

    def figures(self, batch: Batch, taught: Taught, counts: Counts) -> Mapping[str, Tensor]:
        """With the mean score of the response tokens."""
        score = batch.student.target_scores_N.sum() / counts["response_tokens"].clamp_min(1).float()
        return {**self._inner.figures(batch, taught, counts), PRIVATE: score}

    def advice(self, means: Mapping[str, Tensor]) -> str | None:
        """None where labels are masked: the student's mean then leaves out what the teacher's counts."""
        if self._policy.cross_entropy < 1 and PRIVATE in means and bool(means[PRIVATE] > 0):
            return None
        return self._inner.advice(means)
