"""A teacher that is asked twice, with the picture and without it, so that tokens that need it weigh more.

Or it was asked so before, and a cache holds how much it needs the picture for each token.

Shape legend: I images, N response rows, P places of the flattened rows; in features: I images, N tokens of an
image, E tower width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from llava_kd.batch import Batch, Counts, Inputs
from llava_kd.distill.rows import Rows, response_rows, targets_of_rows
from llava_kd.distill.taught import Dependency, Taught
from llava_kd.distill.teaching.from_teacher import FromTeacher, Predicts
from llava_kd.distill.teaching.pictures.withheld import Withheld, withheld
from llava_kd.distill.teaching.switch import Switch
from llava_kd.distill.token_policy import records_of
from llava_kd.losses.head_loss import head_loss
from llava_kd.losses.reference import HeadLoss
from llava_kd.losses.targets.dependency import scores, weights
from llava_kd.losses.targets.mixture import Voice
from llava_kd.models.mllm import MLLM, Prediction

SCORE = "visual_dependency"
SHARE = "visual_tokens_share"


@dataclass(frozen=True, kw_only=True)
class Weighing:
    """By which score, against what picture, and how much of a record's weight the `top` share of rows takes.

    `gamma`: how much the target counts that has the student's own habit in the place of the teacher's.
    """

    by: Literal["vds", "va"] = "va"
    picture: Withheld = "grey"
    cells: int = 4
    top: float = 0.2
    mass: float = 0.5
    gamma: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.gamma < math.inf:
            raise ValueError(f"gamma must be a number from 0 on; got {self.gamma}")
        if not 0 < self.top <= self.mass <= 1:
            raise ValueError(
                f"top must be above 0 and at most mass, and mass at most 1; got top={self.top}, "
                f"mass={self.mass}"
            )

    def of(self, batch: Batch, seen: Prediction, unseen: Prediction) -> Dependency:
        """Of the response rows of a micro-batch, in their order."""
        inputs = batch.teacher_inputs
        found = self.weighed(batch, self.score(inputs, seen, unseen))
        return replace(found, unseen=_voice(unseen, response_rows(inputs)), gamma=self.gamma)

    @torch.no_grad()
    def score(self, inputs: Inputs, seen: Prediction, unseen: Prediction) -> Tensor:
        """[N] of the response rows: what both readings of the teacher's own inputs tell."""
        rows_N = response_rows(inputs)
        found = scores(_voice(seen, rows_N), _voice(unseen, rows_N), targets_of_rows(inputs, rows_N))
        return found.vds_N if self.by == "vds" else found.va_N

    @torch.no_grad()
    def weighed(self, batch: Batch, score_N: Tensor) -> Dependency:
        """Of these scores of the response rows, of which those beside pictures count; no further target."""
        inputs = batch.teacher_inputs
        rows_N = response_rows(inputs)
        is_shown_N = beside_pictures(inputs, rows_N)
        score_N = torch.where(is_shown_N, score_N, 0)
        is_shared_N = Rows.select("response", batch, with_teacher=True).is_shared_N > 0
        weight_N = weights(
            score_N,
            records_of(inputs)[rows_N],
            is_shown_N & is_shared_N,
            inputs.input_ids_BT.numel(),  # as many records at most; how many, only the device knows
            top=self.top,
            mass=self.mass,
        )
        return Dependency(
            score_N=score_N,
            weight_N=weight_N,
            is_shown_N=is_shown_N,
            drops_rows=self.mass == 1,
        )

    def without_pictures(self, inputs: Inputs) -> Inputs:
        return replace(inputs, pixels_ICHW=withheld(inputs.pixels_ICHW, self.picture, cells=self.cells))


def beside_pictures(inputs: Inputs, rows_N: Tensor) -> Tensor:
    """[N]: whether the record of each of these flat places has a picture that could be read."""
    record_P = records_of(inputs).clamp_min(0)
    has_picture_R = torch.zeros_like(record_P).index_fill(0, record_P[inputs.places.distilled_N], 1)
    return has_picture_R[record_P[rows_N]] > 0


class _Weighed(FromTeacher):
    """With figures of what the response rows weigh."""

    def figures(self, batch: Batch, taught: Taught, counts: Counts) -> Mapping[str, Tensor]:
        """With the mean score of a response token, in nats, and the share of those that weigh more than 1."""
        assert taught.dependency is not None
        share = 1 / counts["response_tokens"].clamp_min(1).float()
        return {
            **super().figures(batch, taught, counts),
            SCORE: taught.dependency.score_N.sum() * share,
            SHARE: (taught.dependency.weight_N > 1).sum() * share,
        }


class StoredWeighing(_Weighed):
    """Says what a cache says; the response rows weigh by the scores that the cache brings."""

    def __init__(
        self, weighing: Weighing, predict: Predicts, *, head_loss: Callable[..., HeadLoss] = head_loss
    ) -> None:
        super().__init__(predict, head_loss=head_loss)
        if weighing.gamma > 0:
            raise ValueError(
                "gamma needs all logits of the teacher without the picture, and a cache has none"
            )
        self._weighing = weighing

    def outside(self, batch: Batch, features_INE: Tensor | None) -> Taught:
        taught = super().outside(batch, features_INE)
        stored, inputs = batch.teacher_rows, batch.teacher_inputs
        if stored is None or stored.dependency_M is None:
            raise ValueError(
                "the batch has no scores of tokens that need the picture; write them into the teacher cache"
            )
        flat_P = stored.dependency_M.new_zeros(inputs.input_ids_BT.numel())
        flat_P = flat_P.index_copy(0, stored.places_M, stored.dependency_M)
        return replace(taught, dependency=self._weighing.weighed(batch, flat_P[response_rows(inputs)]))


class VisuallyWeighed(_Weighed):
    """Says what the teacher says; the response rows weigh by how much it needs the picture for them."""

    def __init__(
        self,
        weighing: Weighing,
        predict: Predicts,
        switch: Switch | None = None,
        *,
        student: MLLM | None = None,
        head_loss: Callable[..., HeadLoss] = head_loss,
    ) -> None:
        """`student`: where it is asked without the picture too, for `gamma`; an engine leaves it whole."""
        super().__init__(predict, switch, head_loss=head_loss)
        if weighing.gamma > 0 and student is None:
            raise ValueError("gamma needs the student, to evaluate it without the picture")
        self._weighing, self._student = weighing, student

    def outside(self, batch: Batch, features_INE: Tensor | None) -> Taught:
        # First, so that whatever a teacher keeps of its last forward is of the pictures as they are.
        unseen = self.predict(self._without_pictures(batch))
        taught = super().outside(batch, features_INE)
        seen = taught.prediction
        if not isinstance(seen, Prediction) or not isinstance(unseen, Prediction):
            raise ValueError("finding the tokens that need the picture takes one teacher, and a live one")
        return replace(taught, dependency=self._weighing.of(batch, seen, unseen))

    def inside(self, batch: Batch, student: Prediction, features_INE: Tensor, taught: Taught) -> Taught:
        taught = super().inside(batch, student, features_INE, taught)
        if self._student is None or taught.dependency is None:
            return taught
        inputs = self._weighing.without_pictures(batch.student)
        with torch.no_grad():
            own = self._student(inputs, self._student.image_features(inputs))
            voice = _voice(own, response_rows(inputs))
        return replace(taught, dependency=replace(taught.dependency, own=voice))

    def _without_pictures(self, batch: Batch) -> Batch:
        inputs = self._weighing.without_pictures(batch.teacher_inputs)
        if batch.teacher is None:
            return replace(batch, student=inputs)
        return replace(batch, teacher=inputs)


def _voice(prediction: Prediction, rows_N: Tensor) -> Voice:
    bias_V = prediction.bias_V
    return Voice(
        prediction.hidden_BTD.flatten(0, 1)[rows_N],
        prediction.head_VD.detach(),
        None if bias_V is None else bias_V.detach(),
        prediction.cap,
    )
