"""Every loss formula in plain PyTorch: short, slow, and the oracle that the fast modules are tested against.

Logits are z = hidden @ head.T (+ bias), and c tanh(z / c) of a head with a cap c (Gemma 2, arXiv 2408.00118).
A row's divergence is that of divergence.py, T^2 times a distance
between the two softmaxes of z / T over the columns that both models share; its cross-entropy is
-log softmax(z_s)[target], at temperature 1 over all of the student's columns.
A relation row is 1 - cos(vec(Y_s Y_s^T), vec(Y_t Y_t^T)) over the N tokens of one image (LLaVA-KD, L_rel).

A DBiLD row (Switch-KD, arXiv 2604.14629, upon BiLD, arXiv 2406.13555) compares differences of logits. A
leader z_l, the teacher and then the student, names its k largest logits; on them d_ij = (z_i - z_j) / T for i
before j in the leader's order, and the row is T^2 KL(softmax(d_s) || softmax(d_t)), summed over both leaders.
k is the knee of the leader's sorted logits (Kneedle, Satopaa et al. 2011). The paper's code is not public:
T^2, the curve of logits and the least k of 4 follow a re-implementation. BiLD has a fixed k, forward KL and
no T^2.

An attention row (CompoDistill, arXiv 2510.12184) compares, layer by layer, how visual tokens of one image
attend to each other: 1 - cos of both maps, each averaged over the queries after entries above mean + standard
deviation of either side are left out, summed over the layers, as in the authors' code.

Arithmetic is fp32 (fp64 for fp64 inputs), also under autocast. A row whose weight is zero is not read, so
what it holds cannot matter. A row that is read and holds NaN or Inf makes the loss NaN.

Shape legend: N rows (in a relation: tokens of an image), V student vocabulary, U teacher vocabulary,
C common columns, D student width, E teacher width, I images, M teacher tokens of an image, K candidates of
DBiLD, P pairs of them, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from llava_kd.losses.checks import (
    check_attention_inputs,
    check_caps,
    check_dbild_inputs,
    check_head_inputs,
    check_relation_inputs,
    check_targets,
)
from llava_kd.losses.divergence import (
    FORWARD,
    Divergence,
    Temperature,
    divergence_rows,
    softened,
    squared,
)

ChangeRows = Callable[[Tensor, Tensor], None]  # of the rows [N], in place, their logits [N, U], bias and all
LEAST_CANDIDATES = 4  # of DBiLD: two would leave one pair, whose softmax is 1 whatever the logits are


class RowsLoss(NamedTuple):
    """`loss` = sum of the rows, differentiable; rows are detached."""

    loss: Tensor
    rows_N: Tensor


class HeadLoss(NamedTuple):
    """`loss` = sum(ce_weight * ce) + sum(kl_weight * kl), differentiable; rows are detached."""

    loss: Tensor
    ce_N: Tensor
    kl_N: Tensor


def head_loss(
    student_ND: Tensor,
    student_head_VD: Tensor,
    targets_N: Tensor,
    *,
    ce_weight_N: Tensor,
    student_bias_V: Tensor | None = None,
    teacher_NE: Tensor | None = None,
    teacher_head_UE: Tensor | None = None,
    teacher_bias_U: Tensor | None = None,
    kl_weight_N: Tensor | None = None,
    temperature: Temperature = 1.0,
    divergence: Divergence = FORWARD,
    num_common: int | None = None,
    student_cap: float | None = None,
    teacher_cap: float | None = None,
    active_rows: tuple[int, int] | None = None,
    teacher_change: ChangeRows | None = None,
) -> HeadLoss:
    """Weighted sums of cross-entropy and T^2-scaled divergence over rows; `kl_N` carries the T^2.

    The softmaxes of the divergence see the first `num_common` columns (default: all, if V == U). The teacher
    receives no gradient. Targets are read where `ce_weight_N` is not zero and may hold anything elsewhere.
    `active_rows` is what the fast form is told; here the rows are looked for. `teacher_change` makes the
    teacher's logits others before they are compared: it is called with rows and their logits.
    """
    num_common = check_head_inputs(
        student_ND, student_head_VD, targets_N, ce_weight_N=ce_weight_N, student_bias_V=student_bias_V,
        teacher_NE=teacher_NE, teacher_head_UE=teacher_head_UE, teacher_bias_U=teacher_bias_U,
        kl_weight_N=kl_weight_N, temperature=temperature, num_common=num_common, student_cap=student_cap,
        teacher_cap=teacher_cap,
    )  # fmt: skip
    check_targets(targets_N, ce_weight_N, student_head_VD.shape[0])
    with torch.autocast(student_ND.device.type, enabled=False):
        # Widened once, so that low-precision inputs have their gradient summed before it is rounded.
        dtype = accumulation_dtype(student_ND)
        student_ND, student_head_VD = student_ND.to(dtype), student_head_VD.to(dtype)
        student_bias_V = None if student_bias_V is None else student_bias_V.to(dtype)
        rows = ce_weight_N.nonzero().squeeze(1)
        logits_NV = head_logits(student_ND[rows], student_head_VD, student_bias_V, student_cap)
        ce = -logits_NV.log_softmax(1).gather(1, targets_N[rows].unsqueeze(1)).squeeze(1)
        ce_N = _spread(ce, rows, ce_weight_N)
        loss = (ce_weight_N * ce_N).sum()
        kl_N = torch.zeros_like(ce_N)
        if teacher_NE is not None and teacher_head_UE is not None and kl_weight_N is not None:
            rows = kl_weight_N.nonzero().squeeze(1)
            student_NV = head_logits(student_ND[rows], student_head_VD, student_bias_V, student_cap)
            teacher_NU = head_logits(teacher_NE[rows], teacher_head_UE, teacher_bias_U, teacher_cap).detach()
            if teacher_change is not None:
                teacher_change(rows, teacher_NU)
            kl = divergence_rows(
                softened(student_NV[:, :num_common], temperature).log_softmax(1),
                softened(teacher_NU[:, :num_common], temperature).log_softmax(1),
                divergence,
            )
            kl_N = _spread(squared(temperature) * kl, rows, kl_weight_N)
            loss = loss + (kl_weight_N * kl_N).sum()
    return HeadLoss(loss=loss, ce_N=ce_N.detach(), kl_N=kl_N.detach())


def dbild_loss(
    student_ND: Tensor,
    student_head_VD: Tensor,
    teacher_NE: Tensor,
    teacher_head_UE: Tensor,
    *,
    student_bias_V: Tensor | None = None,
    teacher_bias_U: Tensor | None = None,
    temperature: float = 3.0,
    candidates: int = 64,
    num_common: int | None = None,
    student_cap: float | None = None,
    teacher_cap: float | None = None,
) -> RowsLoss:
    """Sum of DBiLD rows over the first `num_common` columns. The teacher receives no gradient."""
    num_common = check_dbild_inputs(
        student_ND,
        student_head_VD,
        teacher_NE,
        teacher_head_UE,
        temperature=temperature,
        candidates=candidates,
        num_common=num_common,
        caps=(student_cap, teacher_cap),
    )
    with torch.autocast(student_ND.device.type, enabled=False):
        student_NV = head_logits(student_ND, student_head_VD, student_bias_V, student_cap)
        teacher_NU = head_logits(teacher_NE, teacher_head_UE, teacher_bias_U, teacher_cap).detach()
        rows_N = dbild_rows(
            student_NV[:, :num_common],
            teacher_NU[:, :num_common],
            temperature=temperature,
            candidates=candidates,
        )
    return RowsLoss(loss=rows_N.sum(), rows_N=rows_N.detach())


def dbild_rows(student_NC: Tensor, teacher_NC: Tensor, *, temperature: float, candidates: int) -> Tensor:
    """Teacher-led plus student-led differences of logits, each over its own leader's largest."""
    rows_N = torch.zeros_like(student_NC[:, 0])
    for leader_NC in (teacher_NC, student_NC.detach()):
        top_NK, place_NK = leader_NC.topk(min(candidates, leader_NC.shape[1]), dim=1)
        first_P, second_P = torch.triu_indices(top_NK.shape[1], top_NK.shape[1], 1, device=top_NK.device)
        is_pair_NP = second_P < knee(top_NK).unsqueeze(1)  # the first of a pair is before the second
        logp_NP = [
            ((z_NK[:, first_P] - z_NK[:, second_P]) / temperature)
            .masked_fill(~is_pair_NP, -torch.inf)
            .log_softmax(1)
            for z_NK in (student_NC.gather(1, place_NK), teacher_NC.gather(1, place_NK))
        ]
        difference_NP = (logp_NP[0] - logp_NP[1]).masked_fill(~is_pair_NP, 0.0)
        rows_N = rows_N + temperature**2 * (logp_NP[0].exp() * difference_NP).sum(1)
    return rows_N


def knee(sorted_NK: Tensor) -> Tensor:
    """How many of each row's falling values lie before its tail: those down to the knee, at least four.

    Both axes are scaled to 0..1; the knee is where the curve is farthest below the chord between its ends.
    """
    width = sorted_NK.shape[1]
    fall_N1 = sorted_NK[:, :1] - sorted_NK[:, -1:]
    height_NK = (sorted_NK - sorted_NK[:, -1:]) / torch.where(fall_N1 == 0, 1, fall_N1)
    chord_K = 1 - torch.arange(width, device=sorted_NK.device, dtype=sorted_NK.dtype) / (width - 1)
    return ((chord_K - height_NK).argmax(1) + 1).clamp(min(LEAST_CANDIDATES, width), width)


def attention_rows(student_LINN: Tensor, teacher_LINN: Tensor, *, drop_sinks: bool = True) -> Tensor:
    """Sum over layers of 1 - cos between the visual attention of both sides, a value an image, [I].

    Where one side has more layers, m against n, each of the n meets the mean of m - n + 1 neighbours.
    The teacher receives no gradient.
    """
    check_attention_inputs(student_LINN, teacher_LINN)
    if student_LINN.shape[1] == 0:
        return student_LINN.sum((0, 2, 3))
    dtype = accumulation_dtype(student_LINN)
    with torch.autocast(student_LINN.device.type, enabled=False):
        count = min(student_LINN.shape[0], teacher_LINN.shape[0])
        student_LINN = sliding_means(student_LINN.to(dtype), count)
        teacher_LINN = sliding_means(teacher_LINN.detach().to(dtype), count)
        keep_LINN = teacher_LINN != 0
        if drop_sinks:
            for side_LINN in (student_LINN.detach(), teacher_LINN):
                limit_LI = side_LINN.mean((2, 3)) + side_LINN.std((2, 3))
                keep_LINN = keep_LINN & (side_LINN <= limit_LI[..., None, None])
        kept_LIN = keep_LINN.sum(2).clamp_min(1)
        pooled_X1N = [
            ((side_LINN * keep_LINN).sum(2) / kept_LIN).flatten(0, 1).unsqueeze(1)
            for side_LINN in (student_LINN, teacher_LINN)
        ]
        rows_X = cosine_distance_rows(pooled_X1N[0], pooled_X1N[1])
        return rows_X.view(student_LINN.shape[:2]).sum(0)


def sliding_means(maps_LINN: Tensor, count: int) -> Tensor:
    """`count` means of equally many neighbouring layers, each group one layer further than the last."""
    group = maps_LINN.shape[0] - count + 1
    return torch.stack([maps_LINN[first : first + group].mean(0) for first in range(count)])


def relation_rows(
    student_IND: Tensor,
    teacher_IME: Tensor,
    *,
    student_head_VD: Tensor | None = None,
    teacher_head_UE: Tensor | None = None,
    centre: bool = False,
    normalise: bool = False,
    normalise_rows: bool = False,
    student_gram_DD: Tensor | None = None,
    teacher_gram_EE: Tensor | None = None,
    student_cap: float | None = None,
    teacher_cap: float | None = None,
) -> Tensor:
    """1 - cos between the two token-by-token relation matrices R = Y Y^T of each image.

    Y is the logits where heads are given and the features themselves where they are not; the two vocabularies
    need not agree. `centre` subtracts from Y its mean over the tokens of the image, `normalise` then scales
    each token to length one, `normalise_rows` each row of R, which makes the value the mean over the tokens
    of 1 - cos between their rows: N / 2 times the loss of Similarity-Preserving KD (arXiv 1907.09682). The
    Gram matrices are taken so that this function and the fast one can be exchanged; the oracle does not use
    them, it forms the logits.
    """
    check_relation_inputs(student_IND, teacher_IME, student_head_VD, teacher_head_UE)
    check_caps(student_cap, teacher_cap)
    del student_gram_DD, teacher_gram_EE
    dtype = accumulation_dtype(student_IND)
    with torch.autocast(student_IND.device.type, enabled=False):
        how = {"centre": centre, "normalise": normalise}
        student_INN = _relation(student_IND, student_head_VD, student_cap, dtype, **how)
        with torch.no_grad():
            teacher_INN = _relation(teacher_IME, teacher_head_UE, teacher_cap, dtype, **how)
        if normalise_rows:
            student_INN, teacher_INN = unit_rows(student_INN), unit_rows(teacher_INN)
        return cosine_distance_rows(student_INN, teacher_INN)


def _relation(
    features_IND: Tensor,
    head_VD: Tensor | None,
    cap: float | None,
    dtype: torch.dtype,
    *,
    centre: bool,
    normalise: bool,
) -> Tensor:
    y_INV = features_IND.to(dtype)
    if head_VD is not None:
        y_INV = capped(y_INV @ head_VD.to(dtype).T, cap)
    if centre:
        y_INV = y_INV - y_INV.mean(1, keepdim=True)
    if normalise:
        y_INV = unit_rows(y_INV)
    return y_INV @ y_INV.mT


def cosine_distance_rows(a_INN: Tensor, b_INN: Tensor) -> Tensor:
    """1 - cosine of each pair of flattened matrices; 1, whatever the other is, where one of them is zero.

    As half the squared distance between the two at length one: 1 - cosine itself would cancel where the two
    almost agree, which is where training arrives.
    """
    aa_I11, bb_I11 = ((x * x).sum((1, 2), keepdim=True) for x in (a_INN, b_INN))
    difference_INN = a_INN / root_or_one(aa_I11) - b_INN / root_or_one(bb_I11)
    zeros_I = ((aa_I11 == 0).to(a_INN.dtype) + (bb_I11 == 0).to(a_INN.dtype)).flatten()
    return ((difference_INN * difference_INN).sum((1, 2)) + zeros_I) / 2


def unit_rows(x_IMN: Tensor) -> Tensor:
    """Each row of each matrix at length one; a row of zeros as it is."""
    return x_IMN / root_or_one((x_IMN * x_IMN).sum(2, keepdim=True))


def root_or_one(square: Tensor) -> Tensor:
    """Square root, and 1 for 0: a divisor that leaves zeros zero, with a finite gradient."""
    return torch.where(square == 0, 1, square).sqrt()


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64 inputs."""
    return torch.promote_types(tensor.dtype, torch.float32)


def head_logits(
    hidden_ND: Tensor, head_VD: Tensor, bias_V: Tensor | None = None, cap: float | None = None
) -> Tensor:
    """[N, V], at least fp32: what a model says, bias and cap and all."""
    dtype = accumulation_dtype(hidden_ND)
    logits_NV = hidden_ND.to(dtype) @ head_VD.to(dtype).T
    return capped(logits_NV if bias_V is None else logits_NV + bias_V.to(dtype), cap)


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """cap tanh(logits / cap), NaN for what is not finite; as they are without a cap."""
    if cap is None:
        return logits
    return cap * torch.tanh(logits / cap) + 0 * logits.detach()


def _spread(values: Tensor, rows: Tensor, like_N: Tensor) -> Tensor:
    """`values` at `rows` and 0 elsewhere, with NaN in place of Inf."""
    values = values + 0 * values.detach()
    return torch.zeros_like(like_N, dtype=values.dtype).index_put((rows,), values)
