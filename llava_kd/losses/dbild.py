"""The fast form of reference.dbild_loss: a few rows' logits at a time, their gradient finished on the spot.

No logits outlive their chunk, no head is widened whole, and the heads are read in the forward alone, where a
sharding engine has gathered them.

Shape legend: N rows, V student vocabulary, U teacher vocabulary, D student width, E teacher width,
C rows of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from llava_kd.losses import reference
from llava_kd.losses.checks import check_dbild_inputs
from llava_kd.losses.kernels import gemm
from llava_kd.losses.reference import RowsLoss, accumulation_dtype

_CHUNK_ROWS = 256


@gemm.not_compiled
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
    chunk_rows: int = _CHUNK_ROWS,
) -> RowsLoss:
    """What reference.dbild_loss returns."""
    num_common = check_dbild_inputs(
        student_ND,
        student_head_VD,
        teacher_NE,
        teacher_head_UE,
        temperature=temperature,
        candidates=candidates,
        num_common=num_common,
    )
    teacher = (teacher_NE.detach(), teacher_head_UE.detach(), teacher_bias_U)
    options = {"temperature": temperature, "candidates": candidates, "num_common": num_common}
    loss, rows_N = _Chunked.apply(
        student_ND, student_head_VD, student_bias_V, teacher, options, chunk_rows, torch.is_grad_enabled()
    )
    return RowsLoss(loss=loss, rows_N=rows_N)


class _Context(FunctionCtx):
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    present: list[bool]


class _Chunked(torch.autograd.Function):
    """Sum of the rows and the rows; the gradient of the sum is saved, and scaled in the backward."""

    @staticmethod
    def forward(
        ctx: _Context,
        student_ND: Tensor,
        head_VD: Tensor,
        bias_V: Tensor | None,
        teacher: tuple[Tensor, Tensor, Tensor | None],
        options: dict[str, float | int],
        chunk_rows: int,
        wants_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = accumulation_dtype(student_ND)
        is_16_bit = gemm.product_dtype(student_ND.device) is not None or gemm.is_half(head_VD.dtype)
        sources = (student_ND, head_VD, bias_V)
        # Summed over chunks before they are rounded.
        gradients = [
            torch.zeros_like(source, dtype=dtype) if wants_gradient and need and source is not None else None
            for need, source in zip(ctx.needs_input_grad[:3], sources, strict=True)
        ]
        rows = [student_ND.new_zeros(0, dtype=dtype)]
        for first in range(0, student_ND.shape[0], chunk_rows):
            part = slice(first, first + chunk_rows)
            sides = (student_ND[part].detach(), head_VD.detach(), bias_V)
            of_teacher = (teacher[0][part], *teacher[1:])
            with gemm.tf32_on_cuda(student_ND.device, is_16_bit):
                rows_C, gradient_CV = _of_chunk(sides, of_teacher, options, wants_gradient=_any(gradients))
                rows.append(rows_C)
                if gradient_CV is not None:
                    _add(gradients, part, gradient_CV, sides)
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
        return (*scaled, None, None, None, None)


def _any(gradients: list[Tensor | None]) -> bool:
    return any(gradient is not None for gradient in gradients)


def _of_chunk(
    student: tuple[Tensor, Tensor, Tensor | None],
    teacher: tuple[Tensor, Tensor, Tensor | None],
    options: dict[str, float | int],
    *,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Values of the rows, and the gradient of the student's logits, over the common columns alone."""
    num_common = int(options["num_common"])
    with torch.autocast(student[0].device.type, enabled=False), torch.enable_grad():
        student_CV, teacher_CV = (_logits(side, num_common) for side in (student, teacher))
        student_CV.requires_grad_(wants_gradient)
        rows_C = reference.dbild_rows(
            student_CV,
            teacher_CV,
            temperature=float(options["temperature"]),
            candidates=int(options["candidates"]),
        )
        gradient_CV = torch.autograd.grad(rows_C.sum(), student_CV)[0] if wants_gradient else None
    return rows_C.detach(), gradient_CV


def _logits(side: tuple[Tensor, Tensor, Tensor | None], num_common: int) -> Tensor:
    """The head is read block by block, and no farther than the common columns."""
    hidden_CD, head_VD, bias_V = side
    with torch.no_grad():
        logits_CV = gemm.wide_logits(hidden_CD, head_VD[:num_common], accumulation_dtype(hidden_CD))
        return logits_CV if bias_V is None else logits_CV.add_(bias_V[:num_common])


def _add(
    gradients: list[Tensor | None],
    part: slice,
    gradient_CV: Tensor,
    student: tuple[Tensor, Tensor, Tensor | None],
) -> None:
    """What the gradient of some rows' logits gives those rows, the head and its bias."""
    hidden_CD, head_VD, _ = student
    num_common = gradient_CV.shape[1]
    dX_ND, dW_VD, db_V = gradients
    if dX_ND is not None:
        dX_ND[part] = gemm.wide_times_head(gradient_CV, head_VD[:num_common], dX_ND.dtype)
    if dW_VD is not None:
        gemm.add_outer(dW_VD[:num_common], gradient_CV, hidden_CD)
    if db_V is not None:
        db_V[:num_common] += gradient_CV.sum(0)
