"""Triton kernels from logits to loss rows and logit gradients; one program reads one row.

`statistics` reads both rows once: each lane keeps its own running maximum and sum, so that a block needs one
exponential per element and no exchange between lanes before the row ends. `mixture` is the extra pass of
jsd and the skewed forms, whose mixture needs both log-sum-exps first. `gradient` writes dz. There is no
`tl.dot` here: the matrix products stay in cuBLAS, and the kernels run in Triton's interpreter on a CPU.

Formulas are those of reference.py; with g = d divergence / d p_s, dz = p_s (g - sum(p_s g)).

A row's statistics are: log-sum-exp of the student at T, of the teacher at T, of the student at 1; sum(p_s g).
"""

from __future__ import annotations

# Triton's annotations know neither what a kernel returns nor that a constexpr may be a plain value.
# pyright: reportOperatorIssue=false, reportArgumentType=false
import triton
import triton.language as tl

MASKED = tl.constexpr(-1e30)  # finite, so that a lane without columns does not make NaN
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _load(row_ptr, bias_ptr, columns, width, limit, HAS_BIAS: tl.constexpr):
    """Logits of some columns as fp32, bias added; MASKED from `limit` on.

    What is loaded ends at the row's width, which is a multiple of 16 in practice, so that loads stay wide for
    an odd number of common columns.
    """
    x = tl.load(row_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    return tl.where(columns < limit, x, MASKED)


@triton.jit
def _shift(largest, total, x):
    """Online softmax of each lane: new maximum and sum, factor of what was summed, weight of x.

    Of exp(old maximum - new) and exp(x - new) one is always 1, so a single exponential serves both. An Inf
    among the logits, of either sign, makes the sum NaN.
    """
    difference = x - largest
    smaller = tl.exp(-tl.abs(difference))
    is_larger = difference > 0
    factor = tl.where(is_larger, smaller, 1.0)
    weight = tl.where(is_larger, 1.0, smaller)
    total = tl.where(tl.abs(x) == INFINITY, float("nan"), total * factor + weight)
    return tl.maximum(largest, x), total, factor, weight


@triton.jit
def _finite_or_nan(x):
    return tl.where(tl.abs(x) < INFINITY, x, float("nan"))


@triton.jit
def _both_sides(
    student_row,
    teacher_row,
    student_bias_ptr,
    teacher_bias_ptr,
    num_classes,
    teacher_classes,
    num_common,
    inverse_temperature,
    KIND: tl.constexpr,
    HAS_STUDENT_BIAS: tl.constexpr,
    HAS_TEACHER_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Lane statistics of the student, log-sum-exp of both sides, divergence where it needs no mixture."""
    lanes = tl.arange(0, BLOCK)
    s_max = tl.full([BLOCK], MASKED, tl.float32)
    t_max = tl.full([BLOCK], MASKED, tl.float32)
    s_sum = tl.zeros([BLOCK], tl.float32)
    t_sum = tl.zeros([BLOCK], tl.float32)
    cross = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_common, BLOCK):
        columns = start + lanes
        s = _load(student_row, student_bias_ptr, columns, num_classes, num_common, HAS_STUDENT_BIAS)
        t = _load(teacher_row, teacher_bias_ptr, columns, teacher_classes, num_common, HAS_TEACHER_BIAS)
        s *= inverse_temperature
        t *= inverse_temperature
        s_max, s_sum, s_factor, s_new = _shift(s_max, s_sum, s)
        t_max, t_sum, t_factor, t_new = _shift(t_max, t_sum, t)
        if KIND == "forward":
            cross = cross * t_factor + t_new * (t - s)
        if KIND == "reverse":
            cross = cross * s_factor + s_new * (s - t)
    s_top = tl.max(s_max)
    t_top = tl.max(t_max)
    s_scale = tl.exp(s_max - s_top)
    t_scale = tl.exp(t_max - t_top)
    s_total = tl.sum(s_sum * s_scale)
    t_total = tl.sum(t_sum * t_scale)
    s_lse = s_top + tl.log(s_total)
    t_lse = t_top + tl.log(t_total)
    kl = 0.0
    if KIND == "forward":
        kl = tl.sum(cross * t_scale) / t_total + (s_lse - t_lse)
    if KIND == "reverse":
        kl = tl.sum(cross * s_scale) / s_total + (t_lse - s_lse)
    return s_max, s_sum, s_lse, t_lse, kl


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
        s = _load(student_row, student_bias_ptr, columns, num_classes, num_classes, HAS_STUDENT_BIAS)
        s = tl.where(columns >= first, s, MASKED)
        s_max, s_sum, _, _ = _shift(s_max, s_sum, s)
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
    KIND: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    HAS_STUDENT_BIAS: tl.constexpr,
    HAS_TEACHER_BIAS: tl.constexpr,
    IS_UNIT_TEMPERATURE: tl.constexpr,
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
            k_max, k_sum, s_lse, t_lse, kl = _both_sides(
                student_row, teacher_ptr + row * teacher_stride, student_bias_ptr, teacher_bias_ptr,
                num_classes, teacher_classes, num_common, inverse_temperature,
                KIND, HAS_STUDENT_BIAS, HAS_TEACHER_BIAS, BLOCK,
            )  # fmt: skip
            tl.store(statistics_row, s_lse)
            tl.store(statistics_row + 1, t_lse)
            tl.store(statistics_row + 3, kl)
            tl.store(kl_ptr + row, _finite_or_nan(kl * squared_temperature))
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
        tl.store(ce_ptr + row, _finite_or_nan(lse - at_target))


@triton.jit
def _over_mixture(log_p, log_q, share):
    """log p - log(share p + (1 - share) q), from the difference alone: exactly 0 where the two are equal.

    Near 0 by series: exp and log of a GPU are right to some 2^-22 of 1, which is all of a small divergence.
    """
    difference = log_p - log_q
    gap = -tl.abs(difference)
    rest = tl.where(difference >= 0, 1 - share, share)
    expm1 = 1 + gap * (1 / 7) * (1 + gap * (1 / 8))
    expm1 = 1 + gap * (1 / 4) * (1 + gap * (1 / 5) * (1 + gap * (1 / 6) * expm1))
    expm1 = gap * (1 + gap * (1 / 2) * (1 + gap * (1 / 3) * expm1))
    is_near = gap > -0.5
    x = rest * tl.where(is_near, expm1, tl.exp(gap) - 1)
    a = x / (2 + x)  # log(1 + x) = 2 atanh(a), and |a| < 1/4 where the gap is small
    b = a * a
    series = 1 / 3 + b * (1 / 5 + b * (1 / 7 + b * (1 / 9 + b * (1 / 11))))
    log1p = tl.where(is_near, 2 * a * (1 + b * series), tl.log(1 + x))
    return tl.where(difference >= 0, 0.0, difference) - log1p


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
    NUM_STATISTICS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Divergence of jsd and the skewed forms, and sum(p_s g) for their gradient."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(kl_weight_ptr + row) != 0:
        student_row = student_ptr + row * student_stride
        teacher_row = teacher_ptr + row * teacher_stride
        statistics_row = statistics_ptr + row * NUM_STATISTICS
        s_lse = tl.load(statistics_row)
        t_lse = tl.load(statistics_row + 1)
        lanes = tl.arange(0, BLOCK)
        divergence = tl.zeros([BLOCK], tl.float32)
        mean_slope = tl.zeros([BLOCK], tl.float32)
        for start in range(0, num_common, BLOCK):
            columns = start + lanes
            mask = columns < num_common
            s = _load(student_row, student_bias_ptr, columns, num_classes, num_common, HAS_STUDENT_BIAS)
            t = _load(teacher_row, teacher_bias_ptr, columns, teacher_classes, num_common, HAS_TEACHER_BIAS)
            s = tl.where(mask, s * inverse_temperature - s_lse, MASKED)
            t = tl.where(mask, t * inverse_temperature - t_lse, MASKED)
            p_s = tl.exp(s)
            p_t = tl.exp(t)
            if KIND == "jsd":
                student_part = p_s * _over_mixture(s, t, 1 - share)
                divergence += share * p_t * _over_mixture(t, s, share) + (1 - share) * student_part
                mean_slope += student_part
            elif KIND == "skewed_forward":
                over = _over_mixture(t, s, share)
                divergence += p_t * over
                mean_slope += p_s * tl.exp(over)
            elif KIND == "skewed_reverse":
                over = _over_mixture(s, t, share)
                divergence += p_s * over
                mean_slope += p_s * (over - share * tl.exp(over))
            else:
                tl.static_assert(False, "mixture lacks this kind of divergence")
        tl.store(statistics_row + 3, tl.sum(mean_slope))
        tl.store(kl_ptr + row, _finite_or_nan(tl.sum(divergence) * squared_temperature))


@triton.jit
def _slope(s, t, mean_slope, share, KIND: tl.constexpr):
    """d divergence / d (z / T) of some columns, from the two log-softmaxes."""
    p_s = tl.exp(s)
    slope = p_s  # for type checkers: one of the branches below is taken, or nothing compiles
    if KIND == "forward":
        slope = p_s - tl.exp(t)
    elif KIND == "reverse":
        slope = p_s * (s - t - mean_slope)
    elif KIND == "jsd":
        slope = (1 - share) * p_s * (_over_mixture(s, t, 1 - share) - mean_slope)
    elif KIND == "skewed_forward":
        slope = (1 - share) * p_s * (mean_slope - tl.exp(_over_mixture(t, s, share)))
    elif KIND == "skewed_reverse":
        over = _over_mixture(s, t, share)
        slope = p_s * (over - share * tl.exp(over) - mean_slope)
    else:
        tl.static_assert(False, "_slope lacks this kind of divergence")
    return slope


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
    lanes = tl.arange(0, BLOCK)
    for start in range(0, num_classes, BLOCK):
        columns = start + lanes
        mask = columns < num_classes
        logits = _load(student_row, student_bias_ptr, columns, num_classes, num_classes, HAS_STUDENT_BIAS)
        gradient = tl.zeros([BLOCK], tl.float32)
        if HAS_TEACHER:  # noqa: SIM102
            if kl_weight != 0:
                is_common = columns < num_common
                t = _load(
                    teacher_row, teacher_bias_ptr, columns, teacher_classes, num_common, HAS_TEACHER_BIAS
                )
                s = tl.where(is_common, logits * inverse_temperature - s_lse, MASKED)
                t = tl.where(is_common, t * inverse_temperature - t_lse, MASKED)
                slope = _slope(s, t, mean_slope, share, KIND)
                gradient += kl_weight * temperature * tl.where(is_common, slope, 0.0)
        if ce_weight != 0:
            gradient += ce_weight * (tl.exp(logits - lse) - tl.where(columns == target, 1.0, 0.0))
        tl.store(gradient_row + columns, gradient.to(gradient_ptr.dtype.element_ty), mask=mask)
