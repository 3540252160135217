"""The sum of a value a row of logits, a few rows at a time, their gradient finished on the spot.

No logits outlive their chunk, no head is widened whole, and the head is read in the forward alone, where a
sharding engine has gathered it.

Shape legend: N rows, V vocabulary, D width, C rows of a chunk, K leading columns that are read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from llava_kd.losses.kernels import gemm
from llava_kd.losses.kernels.capping import cap_, through_cap_
from llava_kd.losses.reference import RowsLoss, accumulation_dtype

RowsOf = Callable[[slice, Tensor], Tensor]  # of the rows of a slice, their logits [C, K]: values [C]


class Side(NamedTuple):
    """Rows, head, bias and cap of a model."""

    hidden_ND: Tensor
    head_VD: Tensor
    bias_V: Tensor | None = None
    cap: float | None = None


@gemm.not_compiled
def sum_of_rows(side: Side, rows_of: RowsOf, *, num_columns: int, chunk_rows: int) -> RowsLoss:
    """`rows_of` of all rows and their sum, which alone is differentiable, by rows, head and bias.

    `rows_of` is shown the first `num_columns` logits of some rows, and must be differentiable by them.
    """
    how = _How(side.cap, rows_of, num_columns, chunk_rows, torch.is_grad_enabled())
    loss, rows_N = _Chunked.apply(*side[:3], how)
    return RowsLoss(loss=loss, rows_N=rows_N)


def leading_logits(side: Side, num_columns: int) -> Tensor:
    """[C, K], at least fp32, without gradient: the head is read block by block, and no farther."""
    hidden_CD, head_VD, bias_V, cap = side
    with torch.no_grad():
        logits_CK = gemm.wide_logits(hidden_CD, head_VD[:num_columns], accumulation_dtype(hidden_CD))
        return cap_(logits_CK if bias_V is None else logits_CK.add_(bias_V[:num_columns]), cap)


class _How(NamedTuple):
    cap: float | None
    rows_of: RowsOf
    num_columns: int
    chunk_rows: int
    wants_gradient: bool


class _Context(FunctionCtx):
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    present: list[bool]


class _Chunked(torch.autograd.Function):
    """Sum of the rows and the rows; the gradient of the sum is saved, and scaled in the backward."""

    @staticmethod
    def forward(
        ctx: _Context,
        hidden_ND: Tensor,
        head_VD: Tensor,
        bias_V: Tensor | None,
        how: _How,
    ) -> tuple[Tensor, Tensor]:
        cap, rows_of, num_columns, chunk_rows, wants_gradient = how
        dtype = accumulation_dtype(hidden_ND)
        is_16_bit = gemm.product_dtype(hidden_ND.device) is not None or gemm.is_half(head_VD.dtype)
        sources = (hidden_ND, head_VD, bias_V)
        # Summed over chunks before they are rounded.
        gradients = [
            torch.zeros_like(source, dtype=dtype) if wants_gradient and need and source is not None else None
            for need, source in zip(ctx.needs_input_grad[:3], sources, strict=True)
        ]
        rows = [hidden_ND.new_zeros(0, dtype=dtype)]
        for first in range(0, hidden_ND.shape[0], chunk_rows):
            part = slice(first, first + chunk_rows)
            side = Side(hidden_ND[part].detach(), head_VD.detach(), bias_V, cap)
            with gemm.tf32_on_cuda(hidden_ND.device, is_16_bit):
                rows_C, gradient_CK = _of_chunk(side, rows_of, part, num_columns, gradients)
                rows.append(rows_C)
                if gradient_CK is not None:
                    _add(gradients, part, gradient_CK, side)
        rows_N = torch.cat(rows)
        ctx.present = [gradient is not None for gradient in gradients]
        ctx.save_for_backward(
            *(
                gradient.to(source.dtype)
                for gradient, source in zip(gradients, sources, strict=True)
                if gradient is not None and source is not None
            )
        )
        ctx.mark_non_differentiable(rows_N)
        return rows_N.sum(), rows_N

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: _Context, grad: Tensor, _grad_N: Tensor
    ) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        scaled = [next(saved) * grad if present else None for present in ctx.present]
        return (*scaled, None)


def _of_chunk(
    side: Side, rows_of: RowsOf, part: slice, num_columns: int, gradients: list[Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """Values of the rows, and the gradient of their leading logits, before a cap, where one is wanted."""
    wants_gradient = any(gradient is not None for gradient in gradients)
    with torch.autocast(side[0].device.type, enabled=False), torch.enable_grad():
        logits_CK = leading_logits(side, num_columns).requires_grad_(wants_gradient)
        rows_C = rows_of(part, logits_CK)
        gradient_CK = torch.autograd.grad(rows_C.sum(), logits_CK)[0] if wants_gradient else None
        if gradient_CK is not None and side.cap is not None:
            gradient_CK = through_cap_(gradient_CK.clone(), logits_CK.detach(), side.cap)
    return rows_C.detach(), gradient_CK


def _add(gradients: list[Tensor | None], part: slice, gradient_CK: Tensor, side: Side) -> None:
    """What the gradient of some rows' logits gives those rows, the head and its bias."""
    hidden_CD, head_VD, *_ = side
    num_columns = gradient_CK.shape[1]
    dX_ND, dW_VD, db_V = gradients
    if dX_ND is not None:
        dX_ND[part] = gemm.wide_times_head(gradient_CK, head_VD[:num_columns], dX_ND.dtype)
    if dW_VD is not None:
        gemm.add_outer(dW_VD[:num_columns], gradient_CK, hidden_CD)
    if db_V is not None:
        db_V[:num_columns] += gradient_CK.sum(0)
