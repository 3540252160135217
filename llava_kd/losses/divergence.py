"""Distances between the softmaxes of two models, and the temperature that softens both: the plain formulas.

With p_t and p_s the softmaxes of teacher and student over their common columns and b, a, l, u the `mix`:

    forward          KL(p_t || p_s)                                        Hinton et al. 2015; LLaVA-KD (arXiv
                                                                           2410.16236), L_res and L_vis
    reverse          KL(p_s || p_t)                                        MiniLLM, arXiv 2306.08543
    jsd              b KL(p_t || m) + (1 - b) KL(p_s || m), m = b p_t + (1 - b) p_s    GKD, arXiv 2306.13649
    skewed_forward   KL(p_t || a p_t + (1 - a) p_s)                        DistiLLM, arXiv 2402.03898
    skewed_reverse   KL(p_s || (1 - a) p_t + a p_s)                        DistiLLM
    total_variation  sum |p_t - p_s| / 2                                   f-distill, arXiv 2307.15190
    symmetric        (1 - l) KL(p_t || p_s) + l KL(p_s || p_t)             DistiLLM's code, there with l = 0.9
    adaptive         (1 - w) KL(p_t || p_s) + w KL(p_s || p_t)             AKL, arXiv 2404.02657, with u = 0.5

The w of `adaptive` is a row's own and has no gradient: the share of sum |p_t - p_s| that lies in the
teacher's tail, 1/2 where the sum is 0. The head, in the order of p_t, is all that the sum of p_t from the
largest to itself leaves at or below u, and always the largest; columns of equal p_t stand or fall together.
That is the authors' code.

A temperature T divides the logits, and the divergence is multiplied by T^2. At the temperature `std` each
side's logits are divided by their own standard deviation over the common columns (n - 1 in its divisor), row
by row, and there is no further factor: Mixup in KD, arXiv 2211.03946. Its code lets the gradient pass through
the student's deviation, and so it does here. Subtracting the mean first, as here for the sake of rounding
and in arXiv 2403.01427, changes no softmax. A row without spread is divided by 1.

Shape legend: N rows, C common columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Kind = Literal[
    "forward",
    "reverse",
    "jsd",
    "skewed_forward",
    "skewed_reverse",
    "total_variation",
    "symmetric",
    "adaptive",
]
KINDS: tuple[Kind, ...] = get_args(Kind)  # the one list: settings, kernels and tests read it
WHOLE_KINDS: tuple[Kind, ...] = ("adaptive",)  # what they read of a column is lost where columns are merged

Temperature = float | Literal["std"]


@dataclass(frozen=True)
class Divergence:
    """Distance between two softmaxes. `mix` is b of `jsd`, a of the skewed forms, l of `symmetric`, u of
    `adaptive`; no other reads it.
    """

    kind: Kind = "forward"
    mix: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"divergence must be one of {list(KINDS)}; got {self.kind!r}")
        if not 0 < self.mix < 1:
            raise ValueError(
                f"mix must lie strictly between 0 and 1; got {self.mix}. At the ends, `forward` and `reverse`"
            )


FORWARD = Divergence()


def check_temperature(temperature: Temperature) -> None:
    if isinstance(temperature, str):
        if temperature != "std":
            raise ValueError(f"temperature must be a number or 'std'; got {temperature!r}")
    elif not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be positive and finite; got {temperature}")


def squared(temperature: Temperature) -> float:
    """The factor of a divergence at this temperature."""
    return 1.0 if isinstance(temperature, str) else float(temperature) ** 2


def softened(logits_NC: Tensor, temperature: Temperature) -> Tensor:
    """Logits at a temperature, of which a softmax is taken."""
    return standardised(logits_NC) if isinstance(temperature, str) else logits_NC / temperature


def standardised(logits_NC: Tensor) -> Tensor:
    """(z - mean) / standard deviation of each row; zeros, with a finite gradient, where none deviates."""
    centred_NC = logits_NC - logits_NC.mean(1, keepdim=True)
    return centred_NC / deviation(centred_NC).unsqueeze(1)


def deviation(centred_NC: Tensor) -> Tensor:
    """Standard deviation of rows of mean 0, with n - 1 in its divisor; 1 where there is none."""
    variance_N = (centred_NC * centred_NC).sum(1) / max(1, centred_NC.shape[1] - 1)
    return torch.where(variance_N == 0, 1, variance_N).sqrt()


def divergence_rows(student_logp_NC: Tensor, teacher_logp_NC: Tensor, divergence: Divergence) -> Tensor:
    """Divergence of each row between two log-softmaxes, without T^2. NaN where one is not finite."""
    s, t = student_logp_NC, teacher_logp_NC
    return _distance(s, t, divergence) + nan_unless_finite((s - t).detach())


def nan_unless_finite(values_NC: Tensor) -> Tensor:
    """[N], 0 for rows that are finite: a distance of masses alone would take -Inf for a mass of 0."""
    return 0 * values_NC.sum(1)


def _distance(student_logp_NC: Tensor, teacher_logp_NC: Tensor, divergence: Divergence) -> Tensor:
    s, t, mix = student_logp_NC, teacher_logp_NC, divergence.mix
    match divergence.kind:
        case "forward":
            return _kl(t, s)
        case "reverse":
            return _kl(s, t)
        case "jsd":
            return mix * _kl_to_mixture(t, s, mix) + (1 - mix) * _kl_to_mixture(s, t, 1 - mix)
        case "skewed_forward":
            return _kl_to_mixture(t, s, mix)
        case "skewed_reverse":
            return _kl_to_mixture(s, t, mix)
        case "total_variation":
            return (t.exp() - s.exp()).abs().sum(1) / 2
        case "symmetric":
            return (1 - mix) * _kl(t, s) + mix * _kl(s, t)
        case "adaptive":
            tail_N = tail_share(s.detach(), t, mix)
            return (1 - tail_N) * _kl(t, s) + tail_N * _kl(s, t)
        case _:
            raise lacking(divergence)


def lacking(divergence: Divergence) -> ValueError:
    return ValueError(f"this form of the losses lacks the divergence {divergence.kind!r}; add it")


def _kl(logp_NC: Tensor, logq_NC: Tensor) -> Tensor:
    return (logp_NC.exp() * (logp_NC - logq_NC)).sum(1)


def _kl_to_mixture(logp_NC: Tensor, logq_NC: Tensor, share: float) -> Tensor:
    return (logp_NC.exp() * over_mixture(logp_NC, logq_NC, share)).sum(1)


def over_mixture(logp_NC: Tensor, logq_NC: Tensor, share: float) -> Tensor:
    """log p - log(share p + (1 - share) q), from the difference alone: exactly 0 where the two are equal."""
    difference_NC = logp_NC - logq_NC
    is_larger_NC = difference_NC >= 0
    gap_NC = torch.where(is_larger_NC, -difference_NC, difference_NC)
    rest_NC = torch.where(is_larger_NC, gap_NC.new_full((), 1 - share), gap_NC.new_full((), share))
    return torch.where(is_larger_NC, 0.0, difference_NC) - torch.log1p(rest_NC * torch.expm1(gap_NC))


def tail_share(student_logp_NC: Tensor, teacher_logp_NC: Tensor, head: float) -> Tensor:
    """w of `adaptive`, [N]: of the sum of |p_t - p_s|, what lies outside the teacher's `head`."""
    sorted_NC = teacher_logp_NC.sort(dim=1, descending=True).values
    count_N1 = (sorted_NC.exp().cumsum(1) <= head).sum(1, keepdim=True)
    first_outside_N1 = sorted_NC.gather(1, count_N1.clamp_max(sorted_NC.shape[1] - 1))
    is_head_NC = (teacher_logp_NC > first_outside_N1) | (teacher_logp_NC == sorted_NC[:, :1])
    gap_NC = (teacher_logp_NC.exp() - student_logp_NC.exp()).abs()
    return share_outside(gap_NC, is_head_NC)


def share_outside(gap_NC: Tensor, is_head_NC: Tensor) -> Tensor:
    """Of each row's sum, the part outside the head; 1/2 where the sum is 0."""
    whole_N = gap_NC.sum(1)
    outside_N = gap_NC.masked_fill(is_head_NC, 0.0).sum(1)
    return torch.where(whole_N == 0, 0.5, outside_N / torch.where(whole_N == 0, 1.0, whole_N))
