"""A teacher whose predictions were stored: its head is here, its tower and decoder are not.

Shape legend: B rows, T tokens, I images, N tokens of an image, M places with a stored prediction, D and E
teacher width, V and U rows of its head, K stored columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava_kd.batch import Batch, Inputs, TeacherRows
from llava_kd.distill.taught import AnyPrediction, TopKPrediction
from llava_kd.losses.relation import head_gram
from llava_kd.models.mllm import Prediction


class CachedTeacher:
    """Predictions out of the stored rows that a batch brings. Places without a stored row are zero."""

    def __init__(
        self,
        head_UE: Tensor | None,
        bias_U: Tensor | None,
        *,
        cap: float | None = None,
        keeps_head_gram: bool = False,
    ) -> None:
        """`head_UE` may be None where the largest logits are stored, which need no head."""
        self._head_UE = None if head_UE is None else head_UE.detach()
        self._bias_U = None if bias_U is None else bias_U.detach()
        self._cap = cap
        self._head_gram_EE: Tensor | None = None
        if keeps_head_gram and self._head_UE is not None and cap is None:  # else they are no product of it
            with torch.no_grad():
                self._head_gram_EE = head_gram(self._head_UE)

    def __call__(self, batch: Batch, student_features_INE: Tensor | None = None) -> AnyPrediction:
        """What the teacher said of `batch`; the student's features are not needed.

        Raises ValueError if the batch brings no stored rows.
        """
        del student_features_INE
        rows, inputs = batch.teacher_rows, batch.teacher_inputs
        if rows is None:
            raise ValueError(
                "a cached teacher needs the stored rows of each batch; give the loader the cache"
            )
        if rows.hidden_ME is not None:
            assert self._head_UE is not None
            hidden_BTE = _spread(rows, rows.hidden_ME, inputs)
            projected_INE = rows.projected_INE
            if projected_INE is None:
                projected_INE = hidden_BTE.new_zeros(0, 1, hidden_BTE.shape[2])
            return Prediction(
                hidden_BTD=hidden_BTE,
                projected_IND=projected_INE,
                head_VD=self._head_UE,
                bias_V=self._bias_U,
                cap=self._cap,
                head_gram_DD=self._head_gram_EE,
            )
        assert rows.top_logits_MK is not None
        assert rows.top_columns_MK is not None
        assert rows.rest_M is not None
        return TopKPrediction(
            logits_BTK=_spread(rows, rows.top_logits_MK, inputs),
            columns_BTK=_spread(rows, rows.top_columns_MK, inputs),
            rest_BT=_spread(rows, rows.rest_M, inputs),
            std_BT=None if rows.std_M is None else _spread(rows, rows.std_M, inputs),
        )


def _spread(rows: TeacherRows, values_M: Tensor, inputs: Inputs) -> Tensor:
    """Stored values at their places in [B, T, ...], zeros elsewhere."""
    shape = inputs.input_ids_BT.shape
    flat = values_M.new_zeros(shape.numel(), *values_M.shape[1:])
    return flat.index_copy_(0, rows.places_M, values_M).unflatten(0, shape)
