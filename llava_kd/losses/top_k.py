"""The fast form of reference_top_k.py: the chunks and kernels of head_loss, with another teacher.

Give the teacher's bucket of other columns the student's own shape: q(v) = q(rest) p_s(v) / p_s(rest). Then
every divergence over all common columns equals the one over the k + 1 masses, for in the bucket the ratio of
the two sides is the same at every column. That shape is also where the divergence is least for these masses,
so its dependence on the student adds nothing to the gradient: the row kernels serve as they are, with logits
of q.

Shape legend: N rows, V student vocabulary, D student width, C rows of a chunk, U common columns, K kept ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava_kd.losses.checks import (
    check_head_inputs,
    check_softening_of_top_k,
    check_targets,
    check_top_k,
)
from llava_kd.losses.divergence import FORWARD, Divergence, Temperature, deviation
from llava_kd.losses.head_loss import _Gradients, _HeadLoss, _Side
from llava_kd.losses.kernels import gemm
from llava_kd.losses.kernels.rows import HeadRows
from llava_kd.losses.reference import HeadLoss, accumulation_dtype
from llava_kd.losses.reference_top_k import TopK

_COPIES = 3  # of a chunk's common columns: the logits of q, and what they are made from


@gemm.not_compiled
def top_k_head_loss(
    student_ND: Tensor,
    student_head_VD: Tensor,
    targets_N: Tensor,
    *,
    ce_weight_N: Tensor,
    top: TopK,
    kl_weight_N: Tensor,
    num_common: int,
    student_bias_V: Tensor | None = None,
    temperature: Temperature = 1.0,
    divergence: Divergence = FORWARD,
    student_cap: float | None = None,
    chunk_rows: int | None = None,
) -> HeadLoss:
    """What reference_top_k.top_k_head_loss returns, in memory that does not grow with rows times vocabulary.

    One backward, as with head_loss.
    """
    check_head_inputs(
        student_ND, student_head_VD, targets_N, ce_weight_N=ce_weight_N, student_bias_V=student_bias_V,
        teacher_NE=None, teacher_head_UE=None, teacher_bias_U=None, kl_weight_N=None,
        temperature=temperature, num_common=None,
    )  # fmt: skip
    check_top_k(student_ND, student_head_VD, top.logits_NK, top.columns_NK, top.rest_N, num_common)
    check_softening_of_top_k(temperature, divergence, top.std_N, len(student_ND))
    if targets_N.device.type == "cpu":
        check_targets(targets_N, ce_weight_N, student_head_VD.shape[0])
    rows = HeadRows(
        targets_N=targets_N,
        ce_weight_N=ce_weight_N.detach(),
        kl_weight_N=kl_weight_N.detach(),
        temperature=temperature,
        divergence=divergence,
        num_common=num_common,
        chunk_rows=chunk_rows,
        active_rows=None,
    )
    student = _Side(student_ND, student_head_VD, student_bias_V, torch.float32, cap=student_cap)
    teacher = _TopKSide(top, student, num_common, temperature)
    gradients = _Gradients.wanted_by(student_ND, student_head_VD, student_bias_V)
    inputs = (student_ND, student_head_VD, student_bias_V)
    return HeadLoss(*_HeadLoss.apply(*inputs, student, teacher, rows, gradients))


class _TopKSide(_Side):
    """Logits of q, for rows whose student logits are at hand."""

    is_standard = True

    def __init__(self, top: TopK, student: _Side, num_common: int, temperature: Temperature) -> None:
        self._top = top
        self._student_bias_V = student.bias_V
        self._num_common = num_common
        self._temperature: Temperature = temperature
        self.logits_dtype = accumulation_dtype(student.inputs[0])
        self.bias_V = None

    @property
    def bytes_per_row(self) -> int:
        return _COPIES * self._num_common * self.logits_dtype.itemsize

    def buffer(self, num_rows: int) -> Tensor:
        return self._top.rest_N.new_empty((num_rows, self._num_common), dtype=self.logits_dtype)

    def logits(self, index_C: Tensor, buffer_CV: Tensor, student_CV: Tensor | None = None) -> Tensor:
        """T times the log masses of q, up to a constant of the row; the log masses themselves at `std`."""
        assert student_CV is not None
        kept = self._top[index_C]
        columns_CK = kept.columns_NK.long()
        logits_CU = buffer_CV[: len(index_C)]
        logits_CU.copy_(student_CV[:, : self._num_common])
        if self._student_bias_V is not None:
            logits_CU += self._student_bias_V[: self._num_common]
        if isinstance(self._temperature, str):
            logits_CU -= logits_CU.mean(1, keepdim=True)
            logits_CU /= deviation(logits_CU).unsqueeze(1)
        else:
            logits_CU /= self._temperature
        logits_CU.scatter_(1, columns_CK, -torch.inf)
        shift_C = kept.rest_N.to(logits_CU.dtype) - logits_CU.logsumexp(1)
        logits_CU += shift_C.unsqueeze(1)
        logits_CU.scatter_(1, columns_CK, kept.softened(self._temperature, logits_CU.dtype))
        return logits_CU if isinstance(self._temperature, str) else logits_CU.mul_(self._temperature)
