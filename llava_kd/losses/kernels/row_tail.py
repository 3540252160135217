"""The Triton kernel of the adaptive divergence: how the gap between two rows splits into head and tail.

Nothing is sorted. How far a column lies below the row's largest is a float of no sign, whose bits are in its
order; the bits that end the head are found in rounds, each of which sums the mass within eight bounds and
leaves an eighth of what is in question, so that 31 bits take 11.
"""

from __future__ import annotations

# Triton's annotations know neither what a kernel returns nor that a constexpr may be a plain value.
# pyright: reportOperatorIssue=false, reportArgumentType=false
import triton
import triton.language as tl

from llava_kd.losses.kernels.row_parts import MASKED, finite_or_nan, load, scales, soften

BOUNDS = tl.constexpr(8)
INFINITY_BITS = tl.constexpr(0x7F800000)


@triton.jit
def _logits_of(row, bias_ptr, columns, width, num_common, scale, offset, HAS_BIAS, IS_STD: tl.constexpr):
    x = load(row, bias_ptr, columns, width, num_common, HAS_BIAS)
    return tl.where(columns < num_common, soften(x, scale, offset, IS_STD), MASKED)


@triton.jit
def tail(
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
    HAS_STUDENT_BIAS: tl.constexpr,
    HAS_TEACHER_BIAS: tl.constexpr,
    IS_STD: tl.constexpr,
    NUM_STATISTICS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The tail's share of the gap, and with it the divergence. `share`: the mass that the head may hold."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(kl_weight_ptr + row) != 0:
        student_row = student_ptr + row * student_stride
        teacher_row = teacher_ptr + row * teacher_stride
        statistics_row = statistics_ptr + row * NUM_STATISTICS
        s_lse = tl.load(statistics_row)
        t_lse = tl.load(statistics_row + 1)
        reverse = tl.load(statistics_row + 3)
        forward = tl.load(statistics_row + 4)
        t_top = tl.load(statistics_row + 5)
        s_scale, s_offset, t_scale, t_offset = scales(statistics_row, inverse_temperature, IS_STD)
        lanes = tl.arange(0, BLOCK)
        numbers = tl.arange(0, BOUNDS) + 1
        # What lies as far as `inside` below the largest is of the head; what lies as far as `outside` is not.
        inside = tl.zeros([], tl.int32)
        outside = tl.full([], INFINITY_BITS, tl.int32)
        while outside - inside > 1:
            step = (outside - inside + BOUNDS - 1) // BOUNDS
            bounds = inside + step * numbers
            mass = tl.zeros([BLOCK, BOUNDS], tl.float32)
            for start in range(0, num_common, BLOCK):
                t = _logits_of(
                    teacher_row, teacher_bias_ptr, start + lanes, teacher_classes, num_common,
                    t_scale, t_offset, HAS_TEACHER_BIAS, IS_STD,
                )  # fmt: skip
                below = (t_top - t).to(tl.int32, bitcast=True)
                p_t = tl.exp(t - t_lse)
                mass += tl.where(below[:, None] <= bounds[None, :], p_t[:, None], 0.0)
            fitting = tl.sum((tl.sum(mass, axis=0) <= share).to(tl.int32))
            outside = tl.minimum(outside, inside + step * (fitting + 1))
            inside += step * fitting
        gap = tl.zeros([BLOCK], tl.float32)
        gap_outside = tl.zeros([BLOCK], tl.float32)
        for start in range(0, num_common, BLOCK):
            columns = start + lanes
            s = _logits_of(
                student_row, student_bias_ptr, columns, num_classes, num_common,
                s_scale, s_offset, HAS_STUDENT_BIAS, IS_STD,
            )  # fmt: skip
            t = _logits_of(
                teacher_row, teacher_bias_ptr, columns, teacher_classes, num_common,
                t_scale, t_offset, HAS_TEACHER_BIAS, IS_STD,
            )  # fmt: skip
            difference = tl.abs(tl.exp(t - t_lse) - tl.exp(s - s_lse))
            gap += difference
            gap_outside += tl.where((t_top - t).to(tl.int32, bitcast=True) > inside, difference, 0.0)
        whole = tl.sum(gap)
        reverse_share = tl.where(whole == 0, 0.5, tl.sum(gap_outside) / tl.where(whole == 0, 1.0, whole))
        kl = (1 - reverse_share) * forward + reverse_share * reverse
        tl.store(statistics_row + 4, reverse_share)
        tl.store(kl_ptr + row, finite_or_nan(kl * squared_temperature))
