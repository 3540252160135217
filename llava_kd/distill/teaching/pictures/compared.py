"""The divergence of two models' tokens with a gradient to both: the losses hold the teacher still.

Shape legend: N rows, R rows of a chunk, D and E widths of the models, V and U rows of their heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llava_kd.losses.divergence import FORWARD, Divergence, Temperature, divergence_rows, softened, squared
from llava_kd.losses.reference import capped
from llava_kd.models.mllm import Prediction

_CHUNK = 1 << 24  # logits of one side that are held at once


@dataclass(frozen=True, kw_only=True)
class Compared:
    """The plain formula of a KL term, by its settings, over `num_common` columns of both heads."""

    temperature: Temperature = 1.0
    divergence: Divergence = FORWARD
    num_common: int | None = None

    def __call__(
        self,
        student: tuple[Prediction, Tensor],
        teacher: tuple[Prediction, Tensor],
        weight_N: Tensor,
    ) -> Tensor:
        """Weighted sum over rows, each side a prediction and its flat places; none of the heads moves."""
        sides = [(said.hidden_BTD.flatten(0, 1)[places_N], said) for said, places_N in (student, teacher)]
        rows = max(1, _CHUNK // max(said.head_VD.shape[0] for _, said in sides))
        total = torch.zeros((), device=weight_N.device)
        for start in range(0, len(weight_N), rows):
            parts = [states_ND[start : start + rows] for states_ND, _ in sides]
            heads = [said for _, said in sides]
            # Made again for the gradient: the logits of one chunk at a time are in memory.
            total = total + checkpoint(
                self._chunk, *parts, *heads, weight_N[start : start + rows], use_reentrant=False
            )
        return total

    def _chunk(
        self,
        student_RD: Tensor,
        teacher_RE: Tensor,
        student: Prediction,
        teacher: Prediction,
        weight_R: Tensor,
    ) -> Tensor:
        with torch.autocast(student_RD.device.type, enabled=False):
            said, truth = (
                self._log_softmax(states, side)
                for states, side in ((student_RD, student), (teacher_RE, teacher))
            )
            rows_R = squared(self.temperature) * divergence_rows(said, truth, self.divergence)
            return (weight_R * rows_R).sum()

    def _log_softmax(self, states_RD: Tensor, side: Prediction) -> Tensor:
        dtype = torch.promote_types(states_RD.dtype, torch.float32)
        bias_V = None if side.bias_V is None else side.bias_V.detach().to(dtype)
        logits_RV = torch.nn.functional.linear(states_RD.to(dtype), side.head_VD.detach().to(dtype), bias_V)
        logits_RV = capped(logits_RV[:, : self.num_common], side.cap)
        return softened(logits_RV, self.temperature).log_softmax(1)
