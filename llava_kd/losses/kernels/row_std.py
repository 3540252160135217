"""The Triton kernels of the temperature `std`: each side's own deviation, the gradient through the student's.

With y = (z - mean) / std and n columns, dz = (dy - y sum(y dy) / (n - 1)) / std.
"""

from __future__ import annotations

# Triton's annotations know neither what a kernel returns nor that a constexpr may be a plain value.
# pyright: reportOperatorIssue=false, reportArgumentType=false
import triton
import triton.language as tl

from llava_kd.losses.kernels.row_parts import MASKED, load, scales, slope_of, soften


@triton.jit
def _scale_and_offset(row, bias_ptr, width, num_common, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """1 / std and mean / std of a row's first columns: of each lane first (Welford), then of all together."""
    lanes = tl.arange(0, BLOCK)
    mean = tl.zeros([BLOCK], tl.float32)
    square = tl.zeros([BLOCK], tl.float32)
    count = 0.0
    for start in range(0, num_common, BLOCK):
        columns = start + lanes
        x = load(row, bias_ptr, columns, width, num_common, HAS_BIAS)
        count += 1.0
        difference = tl.where(columns < num_common, x - mean, 0.0)
        mean += difference / count
        square += difference * (x - mean)
    counts = ((num_common - lanes + BLOCK - 1) // BLOCK).to(tl.float32)
    counts = tl.where(lanes < num_common, counts, 0.0)
    row_mean = tl.sum(counts * mean) / num_common
    off = mean - row_mean
    variance = tl.sum(square + counts * off * off) / tl.maximum(num_common - 1, 1)
    scale = 1 / tl.sqrt(tl.where(variance == 0, 1.0, variance))
    return scale, row_mean * scale


@triton.jit
def spread(
    student_ptr,
    teacher_ptr,
    student_bias_ptr,
    teacher_bias_ptr,
    kl_weight_ptr,
    statistics_ptr,
    num_classes,
    teacher_classes,
    num_common,
    student_stride,
    teacher_stride,
    IS_TEACHER_STANDARD: tl.constexpr,
    HAS_STUDENT_BIAS: tl.constexpr,
    HAS_TEACHER_BIAS: tl.constexpr,
    NUM_STATISTICS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Scale and offset of both sides; 1 and 0 of a teacher whose logits come divided."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(kl_weight_ptr + row) != 0:
        statistics_row = statistics_ptr + row * NUM_STATISTICS
        s_scale, s_offset = _scale_and_offset(
            student_ptr + row * student_stride, student_bias_ptr, num_classes, num_common,
            HAS_STUDENT_BIAS, BLOCK,
        )  # fmt: skip
        t_scale = 1.0
        t_offset = 0.0
        if not IS_TEACHER_STANDARD:
            t_scale, t_offset = _scale_and_offset(
                teacher_ptr + row * teacher_stride, teacher_bias_ptr, teacher_classes, num_common,
                HAS_TEACHER_BIAS, BLOCK,
            )  # fmt: skip
        tl.store(statistics_row + 6, s_scale)
        tl.store(statistics_row + 7, s_offset)
        tl.store(statistics_row + 8, t_scale)
        tl.store(statistics_row + 9, t_offset)


@triton.jit
def along(
    student_ptr,
    teacher_ptr,
    student_bias_ptr,
    teacher_bias_ptr,
    kl_weight_ptr,
    statistics_ptr,
    num_classes,
    teacher_classes,
    num_common,
    student_stride,
    teacher_stride,
    share,
    KIND: tl.constexpr,
    HAS_STUDENT_BIAS: tl.constexpr,
    HAS_TEACHER_BIAS: tl.constexpr,
    NUM_STATISTICS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How much of the gradient lies along y, which the deviation takes away: sum(y dy) / (n - 1)."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(kl_weight_ptr + row) != 0:
        student_row = student_ptr + row * student_stride
        teacher_row = teacher_ptr + row * teacher_stride
        statistics_row = statistics_ptr + row * NUM_STATISTICS
        s_lse = tl.load(statistics_row)
        t_lse = tl.load(statistics_row + 1)
        mean_slope = tl.load(statistics_row + 3)
        if KIND == "adaptive":
            share = tl.load(statistics_row + 4)
        s_scale, s_offset, t_scale, t_offset = scales(statistics_row, 1.0, True)
        lanes = tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, num_common, BLOCK):
            columns = start + lanes
            mask = columns < num_common
            s = load(student_row, student_bias_ptr, columns, num_classes, num_common, HAS_STUDENT_BIAS)
            t = load(teacher_row, teacher_bias_ptr, columns, teacher_classes, num_common, HAS_TEACHER_BIAS)
            y = soften(s, s_scale, s_offset, True)
            s = tl.where(mask, y - s_lse, MASKED)
            t = tl.where(mask, soften(t, t_scale, t_offset, True) - t_lse, MASKED)
            total += tl.where(mask, slope_of(s, t, mean_slope, share, KIND) * y, 0.0)
        tl.store(statistics_row + 10, tl.sum(total) / tl.maximum(num_common - 1, 1))
