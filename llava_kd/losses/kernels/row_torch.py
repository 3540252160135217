"""The row kernels of row_kernel.py in plain PyTorch, for devices without Triton; the CPU path.

A few rows at a time, so that the temporaries stay in the cache and their memory does not grow with the chunk.
Formulas are those of divergence.py; with g = d divergence / d p_s, dy = p_s (g - sum(p_s g)) for y the logits
at their temperature. At `std` y = (z - mean) / std, and dz = (dy - y sum(y dy) / (n - 1)) / std.

Shape legend: C rows of a chunk, R rows at a time, V student vocabulary, U teacher vocabulary, K largest
columns of a teacher.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava_kd.losses.divergence import (
    Divergence,
    Temperature,
    deviation,
    lacking,
    nan_unless_finite,
    over_mixture,
    share_outside,
    squared,
    standardised,
    tail_share,
)

ELEMENTS_AT_A_TIME = 2**17  # half a megabyte of fp32: the handful of temporaries stays in a core's cache
LARGEST = (
    1024  # of a teacher's columns, among which its head mostly ends: sorting all takes ten times as long
)


def torch_rows(
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
    `gradient_CV` may share the storage of `student_CV` where the two have the same element size. With a
    teacher, every row has a KL weight. A target outside the vocabulary makes its row NaN.
    """
    num_rows, num_classes = student_CV.shape
    is_std = isinstance(temperature, str)
    dtype = torch.promote_types(student_CV.dtype, torch.float32)
    ce_C, kl_C = student_CV.new_zeros((2, num_rows), dtype=dtype)
    step = max(1, ELEMENTS_AT_A_TIME // num_classes)
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        logits_RV = _as_logits(student_CV[rows], student_bias_V, dtype)
        gradient_RV = None if gradient_CV is None else gradient_CV[rows]
        ce_weight_R = ce_weight_C[rows]
        log_p_RV = slope_RV = None
        if bool(ce_weight_R.count_nonzero()):
            log_p_RV = logits_RV.log_softmax(1)
            ce_C[rows], slope_RV = _cross_entropy(
                log_p_RV, targets_C[rows], ce_weight_R, wants_slope=gradient_CV is not None
            )
        if teacher_CU is None or kl_weight_C is None:
            _store(gradient_RV, slope_RV)
            continue
        weight_R = kl_weight_C[rows]
        teacher_RU = _as_logits(teacher_CU[rows], teacher_bias_U, dtype)
        if divergence.kind == "forward" and not isinstance(temperature, str):
            common = logits_RV[:, :num_common], teacher_RU[:, :num_common]
            kl_R, kl_slope_RV = _forward(*common, temperature, weight_R * temperature)
        else:
            if log_p_RV is None or temperature != 1 or num_common != num_classes:
                log_p_RV = _softened(logits_RV[:, :num_common], temperature)
            teacher_heat = 1.0 if is_std and is_teacher_standard else temperature
            log_q_RV = _softened(teacher_RU[:, :num_common], teacher_heat)
            kl_R, kl_slope_RV = _divergence(log_p_RV, log_q_RV, divergence)
            if isinstance(temperature, str) and gradient_RV is not None:
                _through_deviation(kl_slope_RV, logits_RV[:, :num_common])
            kl_slope_RV *= (weight_R if isinstance(temperature, str) else weight_R * temperature).unsqueeze(1)
        kl_C[rows] = _nan_unless_finite(kl_R * squared(temperature))
        _store(gradient_RV, slope_RV, kl_slope_RV)
    return ce_C, kl_C


def _forward(
    student_RC: Tensor, teacher_RC: Tensor, temperature: float, weight_R: Tensor
) -> tuple[Tensor, Tensor]:
    """Forward divergence of each row of logits, and `weight_R` times its gradient with respect to z / T.

    From two softmaxes, which take their exponentials three times as fast as `exp` does, and once a column
    where log-softmaxes need two. A softmax adds them one after the other: over a vocabulary it is off by up
    to 1e-5, which its own sum, taken in pairs, mends.
    """
    if temperature != 1:
        student_RC, teacher_RC = student_RC / temperature, teacher_RC / temperature
    p_s_RC, p_t_RC = student_RC.softmax(1), teacher_RC.softmax(1)
    sum_s_R1, sum_t_R1 = p_s_RC.sum(1, keepdim=True), p_t_RC.sum(1, keepdim=True)
    mean_R1 = (teacher_RC - student_RC).mul_(p_t_RC).sum(1, keepdim=True) / sum_t_R1
    log_ratio_R1 = _lse(teacher_RC, p_t_RC, sum_t_R1) - _lse(student_RC, p_s_RC, sum_s_R1)
    weight_R1 = weight_R.unsqueeze(1)
    slope_RC = p_s_RC.mul_(weight_R1 / sum_s_R1).sub_(p_t_RC.mul_(weight_R1 / sum_t_R1))  # 0 of equal ones
    return (mean_R1 - log_ratio_R1).squeeze(1), slope_RC


def _lse(logits_RC: Tensor, p_RC: Tensor, sum_R1: Tensor) -> Tensor:
    """Log of the sum of exponentials [R, 1], from a softmax whose own sum is `sum_R1`."""
    return logits_RC.amax(1, keepdim=True) - (p_RC.amax(1, keepdim=True) / sum_R1).log()


def _as_logits(logits_RV: Tensor, bias_V: Tensor | None, dtype: torch.dtype) -> Tensor:
    """fp32 or wider, bias added. An fp16 logit that overflowed makes its row NaN, a negative one too."""
    wide_RV = logits_RV.to(dtype)
    if wide_RV is not logits_RV:
        wide_RV.masked_fill_(wide_RV.isinf().any(1, keepdim=True), torch.nan)
    return wide_RV if bias_V is None else wide_RV + bias_V


def _softened(logits_RV: Tensor, temperature: Temperature) -> Tensor:
    if isinstance(temperature, str):
        return standardised(logits_RV).log_softmax(1)
    return (logits_RV if temperature == 1 else logits_RV / temperature).log_softmax(1)


def _through_deviation(slope_RV: Tensor, logits_RV: Tensor) -> None:
    """From the gradient of standardised logits to that of the logits, in place."""
    y_RV = logits_RV - logits_RV.mean(1, keepdim=True)
    deviation_R1 = deviation(y_RV).unsqueeze(1)
    y_RV /= deviation_R1
    along_R = _dot(slope_RV, y_RV) / max(1, y_RV.shape[1] - 1)
    slope_RV.sub_(y_RV.mul_(along_R.unsqueeze(1))).div_(deviation_R1)


def _cross_entropy(
    log_p_RV: Tensor, targets_R: Tensor, weight_R: Tensor, *, wants_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """Value of each row and the weighted gradient of its logits; zero where the weight is zero."""
    num_classes = log_p_RV.shape[1]
    is_valid_R = (targets_R >= 0) & (targets_R < num_classes)
    index_R1 = targets_R.clamp(0, num_classes - 1).unsqueeze(1)
    ce_R = -log_p_RV.gather(1, index_R1).squeeze(1)
    ce_R = torch.where(is_valid_R, _nan_unless_finite(ce_R), torch.nan)
    ce_R = torch.where(weight_R == 0, 0.0, ce_R)
    if not wants_slope:
        return ce_R, None
    slope_RV = log_p_RV.exp().scatter_add_(1, index_R1, -torch.ones_like(ce_R).unsqueeze(1))
    slope_RV *= torch.where(is_valid_R | (weight_R == 0), weight_R, torch.nan).unsqueeze(1)
    return ce_R, slope_RV


def _divergence(s_RV: Tensor, t_RV: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """Value of each row and its gradient with respect to z / T, from the log-softmaxes of the two sides."""
    mix = divergence.mix
    p_s_RV = s_RV.exp()
    match divergence.kind:
        case "forward":  # at the temperature `std`; at a number see `_forward`
            p_t_RV = t_RV.exp()
            value_R = _dot(p_t_RV, t_RV - s_RV)
            return value_R, p_s_RV.sub_(p_t_RV)
        case "reverse":
            ratio_RV = s_RV - t_RV
            value_R = _dot(p_s_RV, ratio_RV)
            return value_R, ratio_RV.sub_(value_R.unsqueeze(1)).mul_(p_s_RV)
        case "jsd":
            ratio_RV = over_mixture(s_RV, t_RV, 1 - mix)
            student_R = _dot(p_s_RV, ratio_RV)
            value_R = mix * _dot(t_RV.exp(), over_mixture(t_RV, s_RV, mix)) + (1 - mix) * student_R
            return value_R, ratio_RV.sub_(student_R.unsqueeze(1)).mul_(p_s_RV).mul_(1 - mix)
        case "skewed_forward":
            over_RV = over_mixture(t_RV, s_RV, mix)
            value_R = _dot(t_RV.exp(), over_RV) + nan_unless_finite(s_RV)
            share_RV = over_RV.exp_()
            mean_R = _dot(p_s_RV, share_RV)
            return value_R, share_RV.neg_().add_(mean_R.unsqueeze(1)).mul_(p_s_RV).mul_(1 - mix)
        case "skewed_reverse":
            ratio_RV = over_mixture(s_RV, t_RV, mix)
            value_R = _dot(p_s_RV, ratio_RV) + nan_unless_finite(t_RV)
            ratio_RV -= ratio_RV.exp().mul_(mix)
            return value_R, ratio_RV.sub_(_dot(p_s_RV, ratio_RV).unsqueeze(1)).mul_(p_s_RV)
        case "total_variation":
            ratio_RV = s_RV - t_RV
            value_R = (p_s_RV - t_RV.exp()).abs_().sum(1) / 2 + nan_unless_finite(ratio_RV)
            sign_RV = ratio_RV.sign_()
            return value_R, sign_RV.sub_(_dot(p_s_RV, sign_RV).unsqueeze(1)).mul_(p_s_RV).div_(2)
        case "symmetric":
            return _both_ways(s_RV, t_RV, p_s_RV, t_RV.new_full((len(t_RV),), mix))
        case "adaptive":
            return _both_ways(s_RV, t_RV, p_s_RV, _tail_share(s_RV, t_RV, mix))
        case _:
            raise lacking(divergence)


def _both_ways(s_RV: Tensor, t_RV: Tensor, p_s_RV: Tensor, reverse_share_R: Tensor) -> tuple[Tensor, Tensor]:
    """Forward and reverse divergence together, in the shares of each row; takes `p_s_RV` over."""
    p_t_RV, ratio_RV = t_RV.exp(), s_RV - t_RV
    reverse_R = _dot(p_s_RV, ratio_RV)
    value_R = reverse_share_R * reverse_R - (1 - reverse_share_R) * _dot(p_t_RV, ratio_RV)
    slope_RV = ratio_RV.sub_(reverse_R.unsqueeze(1)).mul_(p_s_RV).mul_(reverse_share_R.unsqueeze(1))
    return value_R, slope_RV.add_(p_s_RV.sub_(p_t_RV).mul_((1 - reverse_share_R).unsqueeze(1)))


def _tail_share(s_RV: Tensor, t_RV: Tensor, head: float) -> Tensor:
    """`tail_share` without a sort of all columns, where no row's head reaches further than its largest."""
    largest_RK = t_RV.topk(min(LARGEST, t_RV.shape[1]), dim=1).values
    reached_RK = largest_RK.exp().cumsum(1)
    if not bool((reached_RK[:, -1] > head).all()):
        return tail_share(s_RV, t_RV, head)
    first_outside_R1 = largest_RK.gather(1, (reached_RK <= head).sum(1, keepdim=True))
    is_head_RV = (t_RV > first_outside_R1) | (t_RV == largest_RK[:, :1])
    return share_outside((t_RV.exp() - s_RV.exp()).abs_(), is_head_RV)


def _dot(a_RV: Tensor, b_RV: Tensor) -> Tensor:
    return (a_RV * b_RV).sum(1)


def _nan_unless_finite(values: Tensor) -> Tensor:
    return torch.where(values.isfinite(), values, torch.nan)


def _store(gradient_RV: Tensor | None, slope_RV: Tensor | None, common_RV: Tensor | None = None) -> None:
    """Write the sum of the slopes; `common_RV` covers the leading columns alone."""
    if gradient_RV is None:
        return
    if slope_RV is None:
        if common_RV is None or common_RV.shape[1] < gradient_RV.shape[1]:
            gradient_RV.zero_()
        if common_RV is not None:
            gradient_RV[:, : common_RV.shape[1]].copy_(common_RV)
        return
    if common_RV is not None:
        slope_RV[:, : common_RV.shape[1]] += common_RV
    gradient_RV.copy_(slope_RV)
