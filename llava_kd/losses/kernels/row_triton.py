"""Launches the kernels of row_kernel.py, row_tail.py and row_std.py over the rows of a chunk of logits.

Shape legend: C rows of a chunk, V student vocabulary, U teacher vocabulary, S statistics of a row.
"""

from __future__ import annotations

# Triton's annotations do not know that a constexpr may be a plain value.
# pyright: reportArgumentType=false
import torch
from torch import Tensor

from llava_kd.losses.divergence import Divergence, Kind, Temperature, squared
from llava_kd.losses.kernels import row_kernel, row_std, row_tail

NUM_STATISTICS = 4
ALL_STATISTICS = 11  # with those of `adaptive` and of the temperature `std`
ONE_PASS = ("forward", "reverse", "symmetric")  # `statistics` has the whole divergence
BLOCK = 2048  # at 8 warps 80 registers on sm_90: three programs on a multiprocessor, loads of 16 bytes
NUM_WARPS = 8
TAIL_PART = 2  # eight sums a lane: half as many lanes, or a multiprocessor has room for one program


def triton_rows(
    student_CV: Tensor,
    teacher_CU: Tensor | None,
    *,
    targets_C: Tensor,
    ce_weight_C: Tensor,
    kl_weight_C: Tensor | None,
    student_bias_V: Tensor | None,
    teacher_bias_U: Tensor | None,
    temperature: Temperature,
    divergence: Divergence,
    num_common: int,
    gradient_CV: Tensor | None,
    is_teacher_standard: bool = False,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and T^2 divergence of each row of logits; fills `gradient_CV` where it is given.

    `is_teacher_standard`: at the temperature `std` the teacher's logits are divided already.
    `gradient_CV` may share the storage of `student_CV` where the two have the same element size. A target
    outside the vocabulary makes its row NaN.
    """
    num_rows, num_classes = student_CV.shape
    new = student_CV.new_zeros
    ce_C, kl_C = new(num_rows, dtype=torch.float32), new(num_rows, dtype=torch.float32)
    is_std, kind = isinstance(temperature, str), divergence.kind
    heat = 1.0 if isinstance(temperature, str) else float(temperature)
    num_statistics = ALL_STATISTICS if is_std or kind == "adaptive" else NUM_STATISTICS
    statistics_CS = new((num_rows, num_statistics), dtype=torch.float32)
    if num_rows == 0:
        return ce_C, kl_C
    teacher = student_CV if teacher_CU is None else teacher_CU  # a pointer that is not read
    kl_weight_C = ce_weight_C if kl_weight_C is None else kl_weight_C
    biases = _given(student_bias_V, statistics_CS), _given(teacher_bias_U, statistics_CS)
    widths = (num_classes, teacher.shape[1], num_common, student_CV.stride(0), teacher.stride(0))
    shared = _shared(student_bias_V, teacher_bias_U, num_statistics)
    logits, has_teacher = (student_CV, teacher, *biases), teacher_CU is not None
    rows, softening = (targets_C, ce_weight_C, kl_weight_C), (1 / heat, squared(temperature), divergence.mix)
    with torch.cuda.device_of(student_CV):
        if has_teacher and is_std:
            row_std.spread[(num_rows,)](
                *logits, kl_weight_C, statistics_CS, *widths, IS_TEACHER_STANDARD=is_teacher_standard,
                **shared,
            )  # fmt: skip
        row_kernel.statistics[(num_rows,)](
            *logits, *rows, ce_C, kl_C, statistics_CS, *widths, *softening, KIND=kind,
            HAS_TEACHER=has_teacher, IS_UNIT_TEMPERATURE=temperature == 1, IS_STD=is_std, **shared,
        )  # fmt: skip
        values = (*logits, kl_weight_C, kl_C, statistics_CS, *widths, *softening)
        if has_teacher and kind not in ONE_PASS:
            _second_pass(kind, values, shared | {"IS_STD": is_std})
        if gradient_CV is not None:
            if has_teacher and is_std:
                row_std.along[(num_rows,)](
                    *logits, kl_weight_C, statistics_CS, *widths, divergence.mix, KIND=kind, **shared
                )
            row_kernel.gradient[(num_rows,)](
                *logits, *rows, statistics_CS, gradient_CV, *widths, 1 / heat, heat, divergence.mix,
                KIND=kind, HAS_TEACHER=has_teacher, IS_STD=is_std, **shared,
            )  # fmt: skip
    return ce_C, kl_C


def _given(bias: Tensor | None, pointer: Tensor) -> Tensor:
    """The bias, or a pointer that is not read."""
    return pointer if bias is None else bias


def _shared(student_bias_V: Tensor | None, teacher_bias_U: Tensor | None, num_statistics: int) -> dict:
    """What every kernel is told."""
    return {
        "HAS_STUDENT_BIAS": student_bias_V is not None,
        "HAS_TEACHER_BIAS": teacher_bias_U is not None,
        "NUM_STATISTICS": num_statistics,
        "BLOCK": BLOCK,
        "num_warps": NUM_WARPS,
    }


def _second_pass(kind: Kind, values: tuple, shared: dict) -> None:
    """The divergence where `statistics` has only what it is made from."""
    grid = (len(values[0]),)
    if kind == "adaptive":
        row_tail.tail[grid](*values, **shared | {"BLOCK": BLOCK // TAIL_PART})
    else:
        row_kernel.mixture[grid](*values, KIND=kind, **shared)
