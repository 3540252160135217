"""The frozen teacher: a callable that no optimiser, checkpoint or `train()` can reach.

Shape legend: I images, N tokens of an image, E width of the tower, or of the teacher in its head's Gram.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llava_kd.batch import Batch
from llava_kd.losses.relation import head_gram
from llava_kd.models.mllm import MLLM, Prediction


class Teacher:
    """Predictions of a frozen model. Not a Module, so the student's tree cannot hold it."""

    def __init__(self, mllm: MLLM, *, shares_tower: bool, keeps_head_gram: bool = False) -> None:
        """`shares_tower`: the student's features are the teacher's, checked by fingerprint by the caller.

        `keeps_head_gram` computes the head's Gram matrix once, for the relation term at the logits.
        """
        self._mllm = mllm.eval().requires_grad_(False)
        self._mllm.stock.eval()
        self.shares_tower = shares_tower
        self._head_gram_EE: Tensor | None = None
        if keeps_head_gram:
            with torch.no_grad():
                self._head_gram_EE = head_gram(mllm.lm_head.weight)

    @property
    def mllm(self) -> MLLM:
        return self._mllm

    def __call__(self, batch: Batch, student_features_INE: Tensor | None = None) -> Prediction:
        """Predict on the teacher's side of `batch`, from the student's features where the tower is shared."""
        with torch.no_grad():
            return self._predict(batch, student_features_INE)

    def with_gradient(self, batch: Batch, student_features_INE: Tensor | None = None) -> Prediction:
        """The same, with gradient to the pixels, and in the teacher's own type wherever it is asked."""
        with torch.autocast(batch.student.pixels_ICHW.device.type, enabled=False):
            return self._predict(batch, student_features_INE)

    def _predict(self, batch: Batch, student_features_INE: Tensor | None) -> Prediction:
        inputs = batch.teacher_inputs
        if self.shares_tower and student_features_INE is not None:
            features_INE = student_features_INE
        else:
            features_INE = self._mllm.image_features(inputs)
        return replace(self._mllm(inputs, features_INE), head_gram_DD=self._head_gram_EE)
