"""The fast form of reference.dbild_loss: a few rows' logits at a time, their gradient finished on the spot.

No logits outlive their chunk, and the head is read in the forward alone,
where a sharding engine has gathered it.

Shape legend: N rows, V student vocabulary, U teacher vocabulary, D student width, E teacher width.
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
        needs = [wants_gradient and need for need in ctx.needs_input_grad[:3]]
        sources = [student_ND, head_VD, bias_V]
        gradients = [
            torch.zeros_like(source, dtype=dtype) if need and source is not None else None
            for need, source in zip(needs, sources, strict=True)
        ]
        # Widened once, so that the head's gradient is summed over chunks before it is rounded.
        wide = [None if source is None else source.detach().to(dtype) for source in sources]
        wide_ND = wide[0]
        assert wide_ND is not None
        rows = [student_ND.new_zeros(0, dtype=dtype)]
        for first in range(0, student_ND.shape[0], chunk_rows):
            part = slice(first, first + chunk_rows)
            leaves = [
                None if tensor is None else tensor.detach().requires_grad_(need)
                for tensor, need in zip((wide_ND[part], *wide[1:]), needs, strict=True)
            ]
            wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
            with torch.enable_grad(), gemm.tf32_on_cuda(student_ND.device, is_16_bit):
                result = _of_chunk(leaves, teacher, part, options)
                found = iter(torch.autograd.grad(result.loss, wanted) if wanted else ())
            rows.append(result.rows_N)
            for number, total in enumerate(gradients):
                if total is not None:
                    (total[part] if number == 0 else total).add_(next(found))
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


def _of_chunk(
    leaves: list[Tensor | None],
    teacher: tuple[Tensor, Tensor, Tensor | None],
    part: slice,
    options: dict[str, float | int],
) -> RowsLoss:
    """The teacher's head is read block by block, and no farther than the common columns."""
    student_ND, head_VD, bias_V = leaves
    teacher_NE, teacher_head_UE, teacher_bias_U = teacher
    assert student_ND is not None
    assert head_VD is not None
    num_common = int(options["num_common"])
    with torch.autocast(student_ND.device.type, enabled=False):
        student_NV = student_ND @ head_VD.T
        if bias_V is not None:
            student_NV = student_NV + bias_V
        dtype = accumulation_dtype(teacher_NE)
        teacher_NC = gemm.wide_logits(teacher_NE[part].detach(), teacher_head_UE[:num_common], dtype)
        if teacher_bias_U is not None:
            teacher_NC += teacher_bias_U.detach()[:num_common]
        rows_N = reference.dbild_rows(
            student_NV[:, :num_common],
            teacher_NC,
            temperature=float(options["temperature"]),
            candidates=int(options["candidates"]),
        )
    return RowsLoss(loss=rows_N.sum(), rows_N=rows_N.detach())
