"""Triton kernels from logits to loss rows and logit gradients; one program reads one row.

`statistics` reads both rows once: each lane keeps its own running maximum and sum, so that a block needs one
exponential per element and no exchange between lanes before the row ends. `mixture` is the extra pass of
jsd, the skewed forms and total variation, which need both log-sum-exps first. `gradient` writes dz. What the
others have beyond these stands in row_tail.py and row_std.py. There is no `tl.dot` here: the matrix products
stay in cuBLAS, and the kernels run in Triton's interpreter on a CPU.
"""

from __future__ import annotations

# Triton's annotations know neither what a kernel returns nor that a constexpr may be a plain value.
# pyright: reportOperatorIssue=false, reportArgumentType=false
import triton
import triton.language as tl

from llava_kd.losses.kernels.row_parts import (
    MASKED,
    finite_or_nan,
    load,
    over_mixture,
    scales,
    shift,
    slope_of,
    soften,
)


@triton.jit
def _both_sides(
    student_row,
    teacher_row,
    student_bias_ptr,
    teacher_bias_ptr,
    num_classes,
    teacher_classes,
    num_common,
    s_scale,
    s_offset,
    t_scale,
    t_offset,
    KIND: tl.constexpr,
    HAS_STUDENT_BIAS: tl.constexpr,
    HAS_TEACHER_BIAS: tl.constexpr,
    IS_STD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Lane statistics of the student, log-sum-exp and largest of both sides, and of the divergences without a
    mixture the one asked for, or both.
    """
    IS_TWO_SIDED: tl.constexpr = KIND == "symmetric" or KIND == "adaptive"
    lanes = tl.arange(0, BLOCK)
    s_max = tl.full([BLOCK], MASKED, tl.float32)
    t_max = tl.full([BLOCK], MASKED, tl.float32)
    s_sum = tl.zeros([BLOCK], tl.float32)
    t_sum = tl.zeros([BLOCK], tl.float32)
    cross = tl.zeros([BLOCK], tl.float32)
    back = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_common, BLOCK):
        columns = start + lanes
        s = load(student_row, student_bias_ptr, columns, num_classes, num_common, HAS_STUDENT_BIAS)
        t = load(teacher_row, teacher_bias_ptr, columns, teacher_classes, num_common, HAS_TEACHER_BIAS)
        s = soften(s, s_scale, s_offset, IS_STD)
        t = soften(t, t_scale, t_offset, IS_STD)
        s_max, s_sum, s_factor, s_new = shift(s_max, s_sum, s)
        t_max, t_sum, t_factor, t_new = shift(t_max, t_sum, t)
        if KIND == "forward" or IS_TWO_SIDED:
            cross = cross * t_factor + t_new * (t - s)
        if KIND == "reverse":
            cross = cross * s_factor + s_new * (s - t)
        if IS_TWO_SIDED:
            back = back * s_factor + s_new * (s - t)
    s_top = tl.max(s_max)
    t_top = tl.max(t_max)
    s_share = tl.exp(s_max - s_top)
    t_share = tl.exp(t_max - t_top)
    s_total = tl.sum(s_sum * s_share)
    t_total = tl.sum(t_sum * t_share)
    s_lse = s_top + tl.log(s_total)
    t_lse = t_top + tl.log(t_total)
    kl = 0.0
    reverse = 0.0
    if KIND == "forward" or IS_TWO_SIDED:
        kl = tl.sum(cross * t_share) / t_total + (s_lse - t_lse)
    if KIND == "reverse":
        kl = tl.sum(cross * s_share) / s_total + (t_lse - s_lse)
    if IS_TWO_SIDED:
        reverse = tl.sum(back * s_share) / s_total + (t_lse - s_lse)
    return s_max, s_sum, s_lse, t_lse, t_top, kl, reverse


@triton.jit
def _finish_row(
    student_row,
    student_bias_ptr,
    first,
    num_classes,
    s_max,
    s_sum,
    HAS_STUDENT_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Log-sum-exp of a row whose columns before `first` are already in the lane statistics."""
    lanes = tl.arange(0, BLOCK)
    for start in range(first // BLOCK * BLOCK, num_classes, BLOCK):
        columns = start + lanes
        s = load(student_row, student_bias_ptr, columns, num_classes, num_classes, HAS_STUDENT_BIAS)
        s = tl.where(columns >= first, s, MASKED)
        s_max, s_sum, _, _ = shift(s_max, s_sum, s)
    s_top = tl.max(s_max)
    return s_top + tl.log(tl.sum(s_sum * tl.exp(s_max - s_top)))


@triton.jit
def statistics(
    student_ptr,
    teacher_ptr,
    student_bias_ptr,
    teacher_bias_ptr,
    target_ptr,
    ce_weight_ptr,
    kl_weight_ptr,
    ce_ptr,
    kl_ptr,
    statistics_ptr,
    num_classes,
    teacher_classes,
    num_common,
    student_stride,
    teacher_stride,
    inverse_temperature,
    squared_temperature,
    share,
    KIND: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    HAS_STUDENT_BIAS: tl.constexpr,
    HAS_TEACHER_BIAS: tl.constexpr,
    IS_UNIT_TEMPERATURE: tl.constexpr,
    IS_STD: tl.constexpr,
    NUM_STATISTICS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Log-sum-exps of both sides, cross-entropy, and the divergence where it needs no mixture."""
    row = tl.program_id(0).to(tl.int64)
    student_row = student_ptr + row * student_stride
    statistics_row = statistics_ptr + row * NUM_STATISTICS
    ce_weight = tl.load(ce_weight_ptr + row)
    s_max = tl.full([BLOCK], MASKED, tl.float32)
    s_sum = tl.zeros([BLOCK], tl.float32)
    first = 0
    if HAS_TEACHER:
        kl_weight = tl.load(kl_weight_ptr + row)
        if kl_weight != 0:
            s_scale, s_offset, t_scale, t_offset = scales(statistics_row, inverse_temperature, IS_STD)
            k_max, k_sum, s_lse, t_lse, t_top, kl, reverse = _both_sides(
                student_row, teacher_ptr + row * teacher_stride, student_bias_ptr, teacher_bias_ptr,
                num_classes, teacher_classes, num_common, s_scale, s_offset, t_scale, t_offset,
                KIND, HAS_STUDENT_BIAS, HAS_TEACHER_BIAS, IS_STD, BLOCK,
            )  # fmt: skip
            mean_slope = kl
            if KIND == "symmetric":
                kl = (1 - share) * kl + share * reverse
                mean_slope = reverse
            if KIND == "adaptive":
                tl.store(statistics_row + 4, kl)
                tl.store(statistics_row + 5, t_top)
                mean_slope = reverse
            tl.store(statistics_row, s_lse)
            tl.store(statistics_row + 1, t_lse)
            tl.store(statistics_row + 3, mean_slope)
            tl.store(kl_ptr + row, finite_or_nan(kl * squared_temperature))
            if IS_UNIT_TEMPERATURE:  # the sum over the common columns is the first part of the sum over all
                s_max = k_max
                s_sum = k_sum
                first = num_common
    if ce_weight != 0:
        target = tl.load(target_ptr + row)
        is_valid = (target >= 0) & (target < num_classes)
        at_target = tl.load(student_row + target, mask=is_valid, other=0.0).to(tl.float32)
        if HAS_STUDENT_BIAS:
            at_target += tl.load(student_bias_ptr + target, mask=is_valid, other=0.0).to(tl.float32)
        lse = _finish_row(
            student_row, student_bias_ptr, first, num_classes, s_max, s_sum, HAS_STUDENT_BIAS, BLOCK
        )
        lse = tl.where(is_valid, lse, float("nan"))
        tl.store(statistics_row + 2, lse)
        tl.store(ce_ptr + row, finite_or_nan(lse - at_target))


@triton.jit
def mixture(
    student_ptr,
    teacher_ptr,
    student_bias_ptr,
    teacher_bias_ptr,
    kl_weight_ptr,
    kl_ptr,
    statistics_ptr,
    num_classes,
    teacher_classes,
    num_common,
    student_stride,
    teacher_stride,
    inverse_temperature,
    squared_temperature,
    share,
    KIND: tl.constexpr,
    HAS_STUDENT_BIAS: tl.constexpr,
    HAS_TEACHER_BIAS: tl.constexpr,
    IS_STD: tl.constexpr,
    NUM_STATISTICS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Divergence of jsd, the skewed forms and total variation, and sum(p_s g) for their gradient."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(kl_weight_ptr + row) != 0:
        student_row = student_ptr + row * student_stride
        teacher_row = teacher_ptr + row * teacher_stride
        statistics_row = statistics_ptr + row * NUM_STATISTICS
        s_lse = tl.load(statistics_row)
        t_lse = tl.load(statistics_row + 1)
        s_scale, s_offset, t_scale, t_offset = scales(statistics_row, inverse_temperature, IS_STD)
        lanes = tl.arange(0, BLOCK)
        divergence = tl.zeros([BLOCK], tl.float32)
        mean_slope = tl.zeros([BLOCK], tl.float32)
        for start in range(0, num_common, BLOCK):
            columns = start + lanes
            mask = columns < num_common
            s = load(student_row, student_bias_ptr, columns, num_classes, num_common, HAS_STUDENT_BIAS)
            t = load(teacher_row, teacher_bias_ptr, columns, teacher_classes, num_common, HAS_TEACHER_BIAS)
            s = tl.where(mask, soften(s, s_scale, s_offset, IS_STD) - s_lse, MASKED)
            t = tl.where(mask, soften(t, t_scale, t_offset, IS_STD) - t_lse, MASKED)
            p_s = tl.exp(s)
            p_t = tl.exp(t)
            if KIND == "jsd":
                student_part = p_s * over_mixture(s, t, 1 - share)
                divergence += share * p_t * over_mixture(t, s, share) + (1 - share) * student_part
                mean_slope += student_part
            elif KIND == "skewed_forward":
                over = over_mixture(t, s, share)
                divergence += p_t * over
                mean_slope += p_s * tl.exp(over)
            elif KIND == "skewed_reverse":
                over = over_mixture(s, t, share)
                divergence += p_s * over
                mean_slope += p_s * (over - share * tl.exp(over))
            elif KIND == "total_variation":
                divergence += 0.5 * tl.abs(p_t - p_s)
                mean_slope += p_s * tl.where(s > t, 0.5, tl.where(s < t, -0.5, 0.0))
            else:
                tl.static_assert(False, "mixture lacks this kind of divergence")
        tl.store(statistics_row + 3, tl.sum(mean_slope))
        tl.store(kl_ptr + row, finite_or_nan(tl.sum(divergence) * squared_temperature))


@triton.jit
def gradient(
    student_ptr,
    teacher_ptr,
    student_bias_ptr,
    teacher_bias_ptr,
    target_ptr,
    ce_weight_ptr,
    kl_weight_ptr,
    statistics_ptr,
    gradient_ptr,
    num_classes,
    teacher_classes,
    num_common,
    student_stride,
    teacher_stride,
    inverse_temperature,
    temperature,
    share,
    KIND: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    HAS_STUDENT_BIAS: tl.constexpr,
    HAS_TEACHER_BIAS: tl.constexpr,
    IS_STD: tl.constexpr,
    NUM_STATISTICS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of the row's weighted loss with respect to the student's logits."""
    row = tl.program_id(0).to(tl.int64)
    student_row = student_ptr + row * student_stride
    gradient_row = gradient_ptr + row * student_stride
    statistics_row = statistics_ptr + row * NUM_STATISTICS
    ce_weight = tl.load(ce_weight_ptr + row)
    teacher_row = teacher_ptr + row * teacher_stride
    kl_weight = tl.load(kl_weight_ptr + row)
    s_lse = tl.load(statistics_row)
    t_lse = tl.load(statistics_row + 1)
    lse = tl.load(statistics_row + 2)
    mean_slope = tl.load(statistics_row + 3)
    target = tl.load(target_ptr + row)
    s_scale, s_offset, t_scale, t_offset = scales(statistics_row, inverse_temperature, IS_STD)
    if KIND == "adaptive":
        share = tl.load(statistics_row + 4)
    along_y = tl.load(statistics_row + 10) if IS_STD else 0.0
    lanes = tl.arange(0, BLOCK)
    for start in range(0, num_classes, BLOCK):
        columns = start + lanes
        mask = columns < num_classes
        logits = load(student_row, student_bias_ptr, columns, num_classes, num_classes, HAS_STUDENT_BIAS)
        gradient = tl.zeros([BLOCK], tl.float32)
        if HAS_TEACHER:  # noqa: SIM102
            if kl_weight != 0:
                is_common = columns < num_common
                t = load(
                    teacher_row, teacher_bias_ptr, columns, teacher_classes, num_common, HAS_TEACHER_BIAS
                )
                y = soften(logits, s_scale, s_offset, IS_STD)
                s = tl.where(is_common, y - s_lse, MASKED)
                t = tl.where(is_common, soften(t, t_scale, t_offset, IS_STD) - t_lse, MASKED)
                slope = slope_of(s, t, mean_slope, share, KIND)
                if IS_STD:
                    slope = (slope - along_y * y) * s_scale
                gradient += kl_weight * temperature * tl.where(is_common, slope, 0.0)
        if ce_weight != 0:
            gradient += ce_weight * (tl.exp(logits - lse) - tl.where(columns == target, 1.0, 0.0))
        tl.store(gradient_row + columns, gradient.to(gradient_ptr.dtype.element_ty), mask=mask)
