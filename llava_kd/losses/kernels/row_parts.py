"""What the row kernels share: reading a row, an online softmax, and each divergence's gradient.

Formulas are those of divergence.py; with g = d divergence / d p_s, dy = p_s (g - sum(p_s g)).

What a row's statistics hold, by number: 0 and 1, log-sum-exp of student and teacher at their temperature;
2, of the student at 1; 3, sum(p_s g), of the two-sided kinds the reverse divergence. Of `adaptive` alone: 4,
the forward divergence and then the reverse one's share; 5, the teacher's largest y. At the temperature `std`
alone, where y = z * scale - offset: 6 and 7 of the student, 8 and 9 of the teacher; 10, sum(y dy) over the
number of columns but one.
"""

from __future__ import annotations

# Triton's annotations know neither what a kernel returns nor that a constexpr may be a plain value.
# pyright: reportOperatorIssue=false, reportArgumentType=false
import triton
import triton.language as tl

MASKED = tl.constexpr(-1e30)  # finite, so that a lane without columns does not make NaN
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def load(row_ptr, bias_ptr, columns, width, limit, HAS_BIAS: tl.constexpr):
    """Logits of some columns as fp32, bias added; MASKED from `limit` on.

    What is loaded ends at the row's width, which is a multiple of 16 in practice, so that loads stay wide for
    an odd number of common columns.
    """
    x = tl.load(row_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    return tl.where(columns < limit, x, MASKED)


@triton.jit
def shift(largest, total, x):
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
def finite_or_nan(x):
    return tl.where(tl.abs(x) < INFINITY, x, float("nan"))


@triton.jit
def scales(statistics_row, inverse_temperature, IS_STD: tl.constexpr):
    """Scale and offset of the student's logits, and of the teacher's."""
    s_scale = inverse_temperature
    t_scale = inverse_temperature
    s_offset = 0.0
    t_offset = 0.0
    if IS_STD:
        s_scale = tl.load(statistics_row + 6)
        s_offset = tl.load(statistics_row + 7)
        t_scale = tl.load(statistics_row + 8)
        t_offset = tl.load(statistics_row + 9)
    return s_scale, s_offset, t_scale, t_offset


@triton.jit
def soften(x, scale, offset, IS_STD: tl.constexpr):
    """Logits at their temperature; what is MASKED stays far below, and finite."""
    y = x * scale
    if IS_STD:
        y = tl.where(x == MASKED, MASKED, y - offset)
    return y


@triton.jit
def over_mixture(log_p, log_q, share):
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
def slope_of(s, t, mean_slope, share, KIND: tl.constexpr):
    """d divergence / d y of some columns, from the two log-softmaxes of y, the logits at a temperature."""
    p_s = tl.exp(s)
    slope = p_s  # for type checkers: one of the branches below is taken, or nothing compiles
    if KIND == "forward":
        slope = p_s - tl.exp(t)
    elif KIND == "reverse":
        slope = p_s * (s - t - mean_slope)
    elif KIND == "jsd":
        slope = (1 - share) * p_s * (over_mixture(s, t, 1 - share) - mean_slope)
    elif KIND == "skewed_forward":
        slope = (1 - share) * p_s * (mean_slope - tl.exp(over_mixture(t, s, share)))
    elif KIND == "total_variation":
        slope = p_s * (tl.where(s > t, 0.5, tl.where(s < t, -0.5, 0.0)) - mean_slope)
    elif KIND == "symmetric" or KIND == "adaptive":
        slope = (1 - share) * (p_s - tl.exp(t)) + share * p_s * (s - t - mean_slope)
    elif KIND == "skewed_reverse":
        over = over_mixture(s, t, share)
        slope = p_s * (over - share * tl.exp(over) - mean_slope)
    else:
        tl.static_assert(False, "slope_of lacks this kind of divergence")
    return slope
