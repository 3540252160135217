"""Several frozen teachers that are asked together and mixed where their probabilities are.

Shape legend: I images, N tokens of an image or response rows, P places of the flattened rows, E tower width,
M teachers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llava_kd.batch import Batch
from llava_kd.distill.rows import response_rows, targets_of_rows
from llava_kd.distill.taught import MixedPrediction
from llava_kd.distill.teaching.live import Teacher
from llava_kd.distill.token_policy import records_of
from llava_kd.losses.row_figures import row_figures
from llava_kd.losses.targets.mixture import log_agreement
from llava_kd.models.mllm import Prediction


class SeveralTeachers:
    """All teachers read the teacher's side of a batch. At least two of them."""

    def __init__(
        self, teachers: Sequence[Teacher], log_weights_M: Tensor | None = None, *, beta: float = 1.0
    ) -> None:
        """Without weights, `beta` times the mean log-likelihood of a record's labels gives that record's."""
        if len(teachers) < 2 or (log_weights_M is not None and len(log_weights_M) != len(teachers)):
            given = "by agreement" if log_weights_M is None else f"{len(log_weights_M)}"
            raise ValueError(
                f"several teachers are two or more, with a weight each; got {len(teachers)}, weights {given}"
            )
        self._teachers, self._log_weights_M, self._beta = tuple(teachers), log_weights_M, beta

    @torch.no_grad()
    def __call__(self, batch: Batch, student_features_INE: Tensor | None = None) -> MixedPrediction:
        """From the student's features where a teacher shares its tower."""
        parts = tuple(teacher(batch, student_features_INE) for teacher in self._teachers)
        if self._log_weights_M is None:
            return MixedPrediction(parts=parts, log_weights_PM=agreement(parts, batch, beta=self._beta))
        ids_BT = batch.teacher_inputs.input_ids_BT
        log_weights_M = self._log_weights_M.to(ids_BT.device).float()
        return MixedPrediction(parts=parts, log_weights_PM=log_weights_M.expand(ids_BT.numel(), -1))


@torch.no_grad()
def agreement(parts: Sequence[Prediction], batch: Batch, *, beta: float) -> Tensor:
    """Log weights [P, M] by agreement: every place has its record's, so that no cut or packing matters."""
    inputs = batch.teacher_inputs
    rows_N = response_rows(inputs)
    targets_N = targets_of_rows(inputs, rows_N)
    likelihood_NM = torch.stack(
        [
            -row_figures(p.hidden_BTD.flatten(0, 1)[rows_N], p.head_VD, p.bias_V, targets_N, cap=p.cap).nll_N
            for p in parts
        ],
        dim=1,
    )
    record_P = records_of(inputs).clamp_min(0)  # before the first record there is padding alone
    # As many records as there are places at most: how many there are, only the device knows.
    return log_agreement(likelihood_NM, record_P[rows_N], len(record_P), beta=beta)[record_P]
