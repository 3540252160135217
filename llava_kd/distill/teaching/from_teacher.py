"""A teacher that is frozen, or stored, behind the door.

Shape legend: I images, N tokens of an image, E tower width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from llava_kd.batch import Batch, Counts
from llava_kd.distill.rows import response_rows, targets_of_rows
from llava_kd.distill.taught import AnyPrediction, MixedPrediction, Taught
from llava_kd.distill.teaching.door import Teaching
from llava_kd.distill.teaching.switch import Switch
from llava_kd.losses.reference import HeadLoss, head_loss
from llava_kd.losses.row_figures import row_figures
from llava_kd.models.mllm import Prediction

OWN = "teacher_cross_entropy"
WEIGHT = "teacher_weight/"  # and the number of a teacher, from 1
WORSE_STEPS = 3


class Predicts(Protocol):
    """A live teacher, a cached one, or several mixed: one prediction of the teacher's side of a batch."""

    def __call__(self, batch: Batch, student_features_INE: Tensor | None = None, /) -> AnyPrediction: ...


class FromTeacher(Teaching):
    """Predicts outside the forward, and switches inside it where there is a switch."""

    def __init__(
        self,
        predict: Predicts,
        switch: Switch | None = None,
        *,
        head_loss: Callable[..., HeadLoss] = head_loss,
    ) -> None:
        self._predict = predict
        self._switch = switch
        self._head_loss = head_loss
        self._steps_worse = 0

    @property
    def switch(self) -> Switch | None:
        return self._switch

    @property
    def predict(self) -> Predicts:
        return self._predict

    @property
    def head_loss(self) -> Callable[..., HeadLoss]:
        return self._head_loss

    def outside(self, batch: Batch, features_INE: Tensor | None) -> Taught:
        return Taught(prediction=self._predict(batch, features_INE))

    def inside(self, batch: Batch, student: Prediction, features_INE: Tensor, taught: Taught) -> Taught:
        if self._switch is None:
            return taught
        return replace(taught, switched=self._switch(batch, student, features_INE))

    def figures(self, batch: Batch, taught: Taught, counts: Counts) -> Mapping[str, Tensor]:
        prediction = taught.prediction
        if isinstance(prediction, MixedPrediction):
            return mixture_figures(prediction, batch, counts)
        if not isinstance(prediction, Prediction):
            return {}
        return {OWN: teacher_cross_entropy(prediction, batch, counts, self._head_loss)}

    def advice(self, means: Mapping[str, Tensor]) -> str | None:
        """Once, that the teacher does worse than the student, at three logged steps in a row."""
        own, student = means.get(OWN), means.get("cross_entropy")
        if own is None or student is None or self._steps_worse >= WORSE_STEPS:
            return None
        self._steps_worse = self._steps_worse + 1 if bool(own > 1.01 * student) else 0
        if self._steps_worse < WORSE_STEPS:
            return None
        return (
            f"the teacher's own cross-entropy on the responses, {float(own):.3f}, is above the student's "
            f"{float(student):.3f}: it holds the student back. Look at its checkpoint, data.template and "
            "image preprocessing, or lower the weight of response_kl"
        )


@torch.no_grad()
def mixture_figures(teachers: MixedPrediction, batch: Batch, counts: Counts) -> dict[str, Tensor]:
    """The mixture's own mean cross-entropy over the response targets, and each one's mean weight there."""
    inputs = batch.teacher_inputs
    rows_N = response_rows(inputs)
    first = teachers.parts[0]
    nll_N = row_figures(
        first.hidden_BTD.flatten(0, 1)[rows_N],
        first.head_VD,
        first.bias_V,
        targets_of_rows(inputs, rows_N),
        cap=first.cap,
        change=teachers.target(rows_N),
    ).nll_N
    share = 1 / counts["response_tokens"].clamp_min(1).float()
    weights_M = teachers.log_weights_PM[rows_N].float().exp().sum(0) * share
    found = {f"{WEIGHT}{m}": weight for m, weight in enumerate(weights_M, 1)}
    return {OWN: nll_N.sum() * share, **found}


@torch.no_grad()
def teacher_cross_entropy(
    teacher: Prediction, batch: Batch, counts: Counts, head_loss: Callable[..., HeadLoss] = head_loss
) -> Tensor:
    """The teacher's own mean over the response targets, as `cross_entropy` is the student's."""
    inputs = batch.teacher_inputs
    rows_N = response_rows(inputs)
    result = head_loss(
        teacher.hidden_BTD.flatten(0, 1)[rows_N],
        teacher.head_VD,
        targets_of_rows(inputs, rows_N),
        student_bias_V=teacher.bias_V,
        student_cap=teacher.cap,
        ce_weight_N=torch.ones(len(rows_N), device=rows_N.device),
        active_rows=(0, len(rows_N)),
    )
    return result.ce_N.sum() / counts["response_tokens"].clamp_min(1).float()
