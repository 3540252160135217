"""Launches row_kernel.py over the rows of a chunk of logits.

Shape legend: C rows of a chunk, V student vocabulary, U teacher vocabulary, S statistics of a row.
"""

from __future__ import annotations

# Triton's annotations do not know that a constexpr may be a plain value.
# pyright: reportArgumentType=false
import torch
from torch import Tensor

from llava_kd.losses.kernels import row_kernel
from llava_kd.losses.reference import Divergence

NUM_STATISTICS = 4
BLOCK = 2048  # at 8 warps 80 registers on sm_90: three programs on a multiprocessor, loads of 16 bytes
NUM_WARPS = 8


def triton_rows(
    student_CV: Tensor,
    teacher_CU: Tensor | None,
    *,
    targets_C: Tensor,
    ce_weight_C: Tensor,
    kl_weight_C: Tensor | None,
    student_bias_V: Tensor | None,
    teacher_bias_U: Tensor | None,
    temperature: float,
    divergence: Divergence,
    num_common: int,
    gradient_CV: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and T^2 divergence of each row of logits; fills `gradient_CV` where it is given.

    `gradient_CV` may share the storage of `student_CV` where the two have the same element size. A target
    outside the vocabulary makes its row NaN.
    """
    num_rows, num_classes = student_CV.shape
    new = student_CV.new_zeros
    ce_C, kl_C = new(num_rows, dtype=torch.float32), new(num_rows, dtype=torch.float32)
    statistics_CS = new((num_rows, NUM_STATISTICS), dtype=torch.float32)
    if num_rows == 0:
        return ce_C, kl_C
    teacher = student_CV if teacher_CU is None else teacher_CU  # a pointer that is not read
    kl_weight_C = ce_weight_C if kl_weight_C is None else kl_weight_C
    biases = (
        statistics_CS if student_bias_V is None else student_bias_V,
        statistics_CS if teacher_bias_U is None else teacher_bias_U,
    )
    widths = (num_classes, teacher.shape[1], num_common, student_CV.stride(0), teacher.stride(0))
    shared = {
        "KIND": divergence.kind,
        "HAS_STUDENT_BIAS": student_bias_V is not None,
        "HAS_TEACHER_BIAS": teacher_bias_U is not None,
        "NUM_STATISTICS": NUM_STATISTICS,
        "BLOCK": BLOCK,
        "num_warps": NUM_WARPS,
    }
    logits, inverse, square = (student_CV, teacher, *biases), 1 / temperature, float(temperature**2)
    has_teacher = teacher_CU is not None
    rows = (targets_C, ce_weight_C, kl_weight_C)
    with torch.cuda.device_of(student_CV):
        row_kernel.statistics[(num_rows,)](
            *logits, *rows, ce_C, kl_C, statistics_CS, *widths, inverse, square,
            HAS_TEACHER=has_teacher, IS_UNIT_TEMPERATURE=temperature == 1, **shared,
        )  # fmt: skip
        if has_teacher and divergence.kind not in ("forward", "reverse"):
            row_kernel.mixture[(num_rows,)](
                *logits, kl_weight_C, kl_C, statistics_CS, *widths, inverse, square, divergence.mix, **shared
            )
        if gradient_CV is not None:
            row_kernel.gradient[(num_rows,)](
                *logits, *rows, statistics_CS, gradient_CV, *widths, inverse, float(temperature),
                divergence.mix, HAS_TEACHER=has_teacher, **shared,
            )  # fmt: skip
    return ce_C, kl_C
