"""A frozen teacher of another kind than LLaVA: it reads its own tokens and pictures, and nothing is shared.

Shape legend: I images, N tokens of an image, E tower width, or of the teacher in its head's Gram.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llava_kd.batch import Batch
from llava_kd.losses.relation import head_gram
from llava_kd.models.foreign.reading import ForeignModel
from llava_kd.models.mllm import Prediction


class ForeignTeacher:
    """Predictions on the teacher's side of a batch. Not a Module, so the student's tree cannot hold it."""

    def __init__(self, model: ForeignModel, *, keeps_head_gram: bool = False) -> None:
        """`keeps_head_gram` computes the head's Gram matrix once, for the relation term at the logits."""
        self._model = model
        self._head_gram_EE: Tensor | None = None
        if keeps_head_gram and model.cap is None:  # capped logits are no product of it
            with torch.no_grad():
                self._head_gram_EE = head_gram(model.head.weight)

    @property
    def model(self) -> ForeignModel:
        return self._model

    def __call__(self, batch: Batch, student_features_INE: Tensor | None = None) -> Prediction:
        del student_features_INE
        inputs = batch.teacher_inputs
        with torch.no_grad(), torch.autocast(inputs.input_ids_BT.device.type, enabled=False):
            return replace(self._model(inputs), head_gram_DD=self._head_gram_EE)
