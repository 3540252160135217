"""The fast form of reference.relation_rows: relations of logits without forming the logits.

With Y = H W^T, Y Y^T = H (W^T W) H^T exactly, and W^T W is only as large as the width squared. A frozen
head's is computed once by its owner and passed in; a moving head's is computed here and carries the head's
gradient W (dG + dG^T). Centring over tokens commutes with the head, so it is done to H; normalising divides R
by the roots of its diagonal. W^T W stays fp32: rounded to bf16 it would cost three digits. Capped logits are
no product: they are formed, some columns of the vocabulary at a time.

Shape legend: I images, N student tokens of an image, M teacher tokens, D student width, E teacher width,
V student vocabulary, U teacher vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.utils.checkpoint import checkpoint

from llava_kd.losses.checks import check_caps, check_relation_inputs
from llava_kd.losses.kernels import gemm
from llava_kd.losses.reference import (
    accumulation_dtype,
    capped,
    cosine_distance_rows,
    root_or_one,
    unit_rows,
)

_CAPPED_COLUMNS = 8192  # of 729 tokens, 24 MB of fp32


@gemm.not_compiled
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
    """What reference.relation_rows returns, one image at a time through the heads' Gram matrices.

    `head_gram` of a frozen head, passed in, saves computing it; the head itself is then not needed, but
    for capped logits, of which the Gram matrix says nothing. Logits are compared where each side has a head
    or its Gram matrix, the features themselves where neither has.
    """
    if student_gram_DD is not None and student_head_VD is not None and student_head_VD.requires_grad:
        raise ValueError("student_gram_DD carries no gradient to a trainable head; leave it out")
    check_caps(student_cap, teacher_cap)
    student_tap = student_gram_DD if student_gram_DD is not None else student_head_VD
    teacher_tap = teacher_gram_EE if teacher_gram_EE is not None else teacher_head_UE
    check_relation_inputs(student_IND, teacher_IME, student_tap, teacher_tap)
    read_as = gemm.product_dtype(student_IND.device)
    with torch.autocast(student_IND.device.type, enabled=False):
        if student_gram_DD is None and student_head_VD is not None and student_cap is None:
            student_gram_DD = head_gram(student_head_VD, read_as=read_as)
        if teacher_gram_EE is None and teacher_head_UE is not None and teacher_cap is None:
            teacher_gram_EE = head_gram(teacher_head_UE.detach())
        student = _Tap(student_head_VD, student_gram_DD, student_cap)
        teacher = _Tap(teacher_head_UE, teacher_gram_EE, teacher_cap)
        _refuse_grams_under_a_cap(student, teacher)
        how = {"centre": centre, "normalise": normalise, "normalise_rows": normalise_rows}
        rows = [
            cosine_distance_rows(
                _relation(student_ND, student, **how),
                _relation(teacher_ME, teacher, **how).detach(),
            )
            for student_ND, teacher_ME in zip(student_IND, teacher_IME, strict=True)
        ]
    if rows:
        return torch.cat(rows)
    empty_I = student_IND.sum((1, 2), dtype=accumulation_dtype(student_IND))  # keeps the graph whole
    return empty_I if student_head_VD is None else empty_I + student_head_VD[:0].sum()


def head_gram(head_VD: Tensor, *, read_as: torch.dtype | None = None) -> Tensor:
    """W^T W of a head, fp32 (fp64 for an fp64 head), with a gradient where the head wants one.

    `read_as`: a type that the products round the head to, as autocast does for logits; None for its own.
    """
    return _Gram.apply(head_VD, read_as or head_VD.dtype)


class _Tap(NamedTuple):
    """Between features and what is compared: nothing, a head by its Gram matrix, or a capped head."""

    head_VD: Tensor | None
    gram_DD: Tensor | None
    cap: float | None


def _refuse_grams_under_a_cap(*taps: _Tap) -> None:
    for tap in taps:
        if tap.cap is not None and tap.gram_DD is not None and tap.head_VD is None:
            raise ValueError(
                "capped logits are no product of a Gram matrix: give the head together with its cap"
            )


def _relation(
    features_ND: Tensor, tap: _Tap, *, centre: bool, normalise: bool, normalise_rows: bool
) -> Tensor:
    """R of one image, as a batch of one."""
    dtype = accumulation_dtype(features_ND)
    head_VD, gram_DD, cap = tap
    is_capped = head_VD is not None and cap is not None
    if centre and not is_capped:
        features_ND = features_ND.to(dtype)
        features_ND = features_ND - features_ND.mean(0)
    if head_VD is not None and cap is not None:
        relation_NN = _of_capped(features_ND.to(dtype), head_VD, cap, centre=centre)
    elif gram_DD is None:
        features_ND = features_ND.to(dtype)
        relation_NN = features_ND @ features_ND.T
    else:
        relation_NN = _Quadratic.apply(features_ND, gram_DD.to(dtype))
    if normalise:
        length_N = root_or_one(relation_NN.diagonal().clamp_min(0))  # rounding can leave it below
        relation_NN = relation_NN / length_N / length_N.unsqueeze(1)
    relation_1NN = relation_NN.unsqueeze(0)
    return unit_rows(relation_1NN) if normalise_rows else relation_1NN


def _of_capped(features_ND: Tensor, head_VD: Tensor, cap: float, *, centre: bool) -> Tensor:
    """Y Y^T of capped logits, a sum over columns: some are there at a time, and again for a gradient."""

    def of_columns(features_ND: Tensor, head_WD: Tensor) -> Tensor:
        y_NW = capped(features_ND @ head_WD.to(features_ND.dtype).T, cap)
        if centre:
            y_NW = y_NW - y_NW.mean(0)
        return y_NW @ y_NW.T

    parts = (
        checkpoint(of_columns, features_ND, head_WD, use_reentrant=False)
        for head_WD in head_VD.split(_CAPPED_COLUMNS)
    )
    return sum(parts, features_ND.new_zeros(()))


class _Context(FunctionCtx):
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


class _GramContext(FunctionCtx):
    saved_tensors: tuple[Tensor, ...]
    read_as: torch.dtype


class _Gram(torch.autograd.Function):
    """W^T W. Saves an alias of W: a sharding engine may put another tensor in the parameter's place."""

    @staticmethod
    def forward(ctx: _GramContext, head_VD: Tensor, read_as: torch.dtype) -> Tensor:
        ctx.save_for_backward(head_VD.detach())
        ctx.read_as = read_as
        return gemm.gram(head_VD.to(read_as))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: _GramContext, grad_DD: Tensor
    ) -> tuple[Tensor, None]:
        (head_VD,) = ctx.saved_tensors
        with torch.autocast(grad_DD.device.type, enabled=False):
            read_VD = head_VD.to(ctx.read_as)
            return gemm.head_times(read_VD, grad_DD + grad_DD.T, head_VD.dtype), None


class _Quadratic(torch.autograd.Function):
    """H G H^T for a symmetric G."""

    @staticmethod
    def forward(ctx: _Context, features_ND: Tensor, gram_DD: Tensor) -> Tensor:
        product_ND = gemm.times_wide(features_ND, gram_DD)
        ctx.save_for_backward(features_ND, product_ND)
        return gemm.times_wide(features_ND, product_ND.T)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: _Context, grad_NN: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        features_ND, product_ND = ctx.saved_tensors
        needs_features, needs_gram = ctx.needs_input_grad
        dfeatures_ND = dgram_DD = None
        with torch.autocast(grad_NN.device.type, enabled=False):
            if needs_features:
                dfeatures_ND = ((grad_NN + grad_NN.T) @ product_ND).to(features_ND.dtype)
            if needs_gram:
                wide_ND = features_ND.to(grad_NN.dtype)
                dgram_DD = wide_ND.T @ (grad_NN @ wide_ND)
        return dfeatures_ND, dgram_DD
