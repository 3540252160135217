"""The fast form of reference.head_loss: cross-entropy and KL without a tensor of rows times vocabulary.

A chunk of rows at a time: two matrix products give the logits of both sides, a row kernel turns them into
loss values and the gradient dz of the student's logits, two more products give dX = dz W and dW += dz^T X.
The gradient is thus complete when the forward ends; the backward multiplies it by the incoming scalar. The
head's weight is needed in the forward only, which is when a sharding engine has it gathered.

Precision: logits and dW are fp32; dz is bf16 for 16-bit products on CUDA and fp32 otherwise, though a CPU
under bf16 autocast may round what it multiplies. fp16 as `logits_dtype` halves the bytes of the logits; a
logit that overflows is refused: its row and the loss become NaN.

Shape legend: N rows, V student vocabulary, U teacher vocabulary, D student width, E teacher width,
C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from llava_kd.losses.checks import check_caps, check_head_inputs, check_targets
from llava_kd.losses.divergence import FORWARD, Divergence, Temperature
from llava_kd.losses.kernels import gemm
from llava_kd.losses.kernels.capping import cap_, through_cap_
from llava_kd.losses.kernels.row_torch import torch_rows
from llava_kd.losses.kernels.rows import HeadRows, chunk_size
from llava_kd.losses.reference import ChangeRows, HeadLoss, accumulation_dtype

try:
    from llava_kd.losses.kernels.row_triton import triton_rows
except ImportError:  # no Triton on this platform
    triton_rows = torch_rows


@gemm.not_compiled
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
    logits_dtype: torch.dtype = torch.float32,
    chunk_rows: int | None = None,
    active_rows: tuple[int, int] | None = None,
    teacher_change: ChangeRows | None = None,
) -> HeadLoss:
    """What reference.head_loss returns, in memory that does not grow with rows times vocabulary.

    Rows without a weight reach no matrix product, rows without a KL weight not the teacher's. Finding them
    costs a host synchronisation on CUDA, unless `active_rows` says how many there are: (rows with a KL
    weight, rows with a cross-entropy weight alone); wrong counts make the loss NaN. So does, on CUDA, a
    target outside the vocabulary; on a CPU that is a ValueError, as in the reference. `chunk_rows` overrides
    the chunk size, which otherwise depends on sizes and the device alone, so that a run repeats bit for bit.

    One backward: the gradient is handed over, not copied. A second one through the same loss raises.
    """
    num_common = check_head_inputs(
        student_ND, student_head_VD, targets_N, ce_weight_N=ce_weight_N, student_bias_V=student_bias_V,
        teacher_NE=teacher_NE, teacher_head_UE=teacher_head_UE, teacher_bias_U=teacher_bias_U,
        kl_weight_N=kl_weight_N, temperature=temperature, num_common=num_common,
    )  # fmt: skip
    if logits_dtype not in (torch.float32, torch.float16):
        raise ValueError(f"logits_dtype must be torch.float32 or torch.float16; got {logits_dtype}")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be positive; got {chunk_rows}")
    if targets_N.device.type == "cpu":
        check_targets(targets_N, ce_weight_N, student_head_VD.shape[0])
    rows = HeadRows(
        targets_N=targets_N,
        ce_weight_N=ce_weight_N.detach(),
        kl_weight_N=None if kl_weight_N is None else kl_weight_N.detach(),
        temperature=temperature,
        divergence=divergence,
        num_common=num_common,
        chunk_rows=chunk_rows,
        active_rows=active_rows,
    )
    student = _Side(student_ND, student_head_VD, student_bias_V, logits_dtype, cap=student_cap)
    teacher = None
    if teacher_NE is not None and teacher_head_UE is not None:
        how = {"change": teacher_change, "cap": teacher_cap}
        teacher = _Side(teacher_NE, teacher_head_UE, teacher_bias_U, logits_dtype, **how)
    inputs = (student_ND, student_head_VD, student_bias_V)
    gradients = _Gradients.wanted_by(*inputs)
    return HeadLoss(*_HeadLoss.apply(*inputs, student, teacher, rows, gradients))


class _Side:
    """One model's rows and head, in the dtypes that its products read.

    `is_standard`: at the temperature `std` its logits come divided by their deviation already.
    """

    is_standard = False
    cap: float | None = None

    def __init__(
        self,
        hidden_ND: Tensor,
        head_VD: Tensor,
        bias_V: Tensor | None,
        logits_dtype: torch.dtype,
        *,
        change: ChangeRows | None = None,
        cap: float | None = None,
    ) -> None:
        """With a cap or a `change` of the logits the bias is in them, and the kernels are told of none."""
        check_caps(cap)
        hidden_ND, head_VD = hidden_ND.detach(), head_VD.detach()
        wide = accumulation_dtype(hidden_ND)
        self.logits_dtype = torch.float16 if logits_dtype == torch.float16 else wide
        self.bias_V = None if bias_V is None else bias_V.detach().to(wide)
        self.cap = cap
        self._change, self._bias_before_V = change, None
        if change is not None or cap is not None:
            self.bias_V, self._bias_before_V = None, self.bias_V
        self.gradient_dtype = wide
        self.inputs = self.logit_operands = (hidden_ND, head_VD)
        if not hidden_ND.is_cuda:
            return  # a CPU widens the head block by block inside the product
        dtype = gemm.product_dtype(hidden_ND.device)
        if dtype is None:
            dtype = torch.promote_types(hidden_ND.dtype, head_VD.dtype)
        if gemm.is_half(dtype):
            self.gradient_dtype = torch.bfloat16
        logit_dtype = torch.float16 if logits_dtype == torch.float16 else dtype
        self.logit_operands = (hidden_ND.to(logit_dtype), head_VD.to(logit_dtype))

    def gradient_operands(self) -> tuple[Tensor, Tensor]:
        """Rows and head as the products of the gradient read them."""
        hidden_ND, head_VD = self.inputs
        if not hidden_ND.is_cuda:
            return hidden_ND, head_VD
        if self.logit_operands[0].dtype == self.gradient_dtype:
            return self.logit_operands
        return hidden_ND.to(self.gradient_dtype), head_VD.to(self.gradient_dtype)

    @property
    def bytes_per_row(self) -> int:
        return self.logit_operands[1].shape[0] * self.logits_dtype.itemsize

    def buffer(self, num_rows: int) -> Tensor:
        hidden_ND, head_VD = self.logit_operands
        return hidden_ND.new_empty((num_rows, head_VD.shape[0]), dtype=self.logits_dtype)

    def logits(self, index_C: Tensor, buffer_CV: Tensor, student_CV: Tensor | None = None) -> Tensor:
        """Logits of some rows, written to the first rows of the buffer; a teacher is shown the student's."""
        hidden_ND, head_VD = self.logit_operands
        logits_CV = buffer_CV[: len(index_C)]
        gemm.write_logits(hidden_ND[index_C], head_VD, logits_CV)
        if self._bias_before_V is not None:
            logits_CV += self._bias_before_V
        cap_(logits_CV, self.cap)
        if self._change is not None:
            self._change(index_C, logits_CV)
        return logits_CV


@gemm.not_compiled
@torch.no_grad()
def by_chunk(
    hidden_ND: Tensor,
    head_VD: Tensor,
    bias_V: Tensor | None,
    of_chunk: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    *,
    cap: float | None = None,
    copies: int = 1,
    chunk_rows: int | None = None,
) -> tuple[Tensor, ...]:
    """What `of_chunk` makes of the indices [C] and logits [C, V] of some rows, of all: [N, V] never exists.

    Logits are at least fp32, whatever autocast says. `copies` of a chunk's logits are in memory at once;
    `chunk_rows` overrides the chunk size, which otherwise depends on that, the sizes and the device alone.
    """
    # Outside: it reads what autocast would round to.
    side = _Side(hidden_ND, head_VD, bias_V, torch.float32, cap=cap)
    index_N = torch.arange(len(hidden_ND), device=hidden_ND.device)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        if len(index_N) == 0:
            return of_chunk(index_N, side.buffer(0))
        bytes_per_row = copies * side.bytes_per_row
        size = chunk_rows or chunk_size(len(index_N), bytes_per_row=bytes_per_row, device=index_N.device)
        buffer_CV = side.buffer(min(size, len(index_N)))
        found = []
        for index_C in index_N.split(size):
            logits_CV = side.logits(index_C, buffer_CV)
            if side.bias_V is not None:
                logits_CV += side.bias_V
            found.append(of_chunk(index_C, logits_CV))
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


@dataclass(kw_only=True)
class _Gradients:
    """dX, dW and db in fp32 or wider, and the inputs' own dtypes; None where no gradient is wanted."""

    dX_ND: Tensor | None
    dW_VD: Tensor | None
    db_V: Tensor | None
    dtypes: tuple[torch.dtype | None, ...] = field(default=())

    @staticmethod
    def wanted_by(hidden_ND: Tensor, head_VD: Tensor, bias_V: Tensor | None) -> _Gradients:
        totals = [
            torch.zeros_like(t, dtype=accumulation_dtype(hidden_ND), memory_format=torch.contiguous_format)
            if t is not None and t.requires_grad and torch.is_grad_enabled()
            else None
            for t in (hidden_ND, head_VD, bias_V)
        ]
        dtypes = tuple(None if t is None else t.dtype for t in (hidden_ND, head_VD, bias_V))
        return _Gradients(dX_ND=totals[0], dW_VD=totals[1], db_V=totals[2], dtypes=dtypes)

    @property
    def any(self) -> bool:
        return any(t is not None for t in (self.dX_ND, self.dW_VD, self.db_V))

    def add(self, index_C: Tensor, gradient_CV: Tensor, operands: tuple[Tensor, Tensor]) -> None:
        """Add what the gradient of some rows' logits contributes."""
        hidden_ND, head_VD = operands
        if self.dX_ND is not None:
            self.dX_ND.index_copy_(0, index_C, gemm.times_head(gradient_CV, head_VD, self.dX_ND.dtype))
        if self.dW_VD is not None:
            gemm.add_outer(self.dW_VD, gradient_CV, hidden_ND[index_C])
        if self.db_V is not None:
            self.db_V += gradient_CV.sum(0, dtype=self.db_V.dtype)

    def times(self, scale: Tensor) -> list[Tensor | None]:
        """The gradients times a scalar, in the inputs' dtypes; in place where nothing is converted."""
        scaled: list[Tensor | None] = []
        for total, dtype in zip((self.dX_ND, self.dW_VD, self.db_V), self.dtypes, strict=True):
            if total is None or dtype is None:
                scaled.append(None)
                continue
            out = total if dtype == total.dtype else torch.empty_like(total, dtype=dtype)
            scaled.append(torch.mul(total, scale, out=out))
        return scaled


class _Context(FunctionCtx):
    gradients: _Gradients | None


class _HeadLoss(torch.autograd.Function):
    """Joins the finished gradients to the graph; the three leading inputs are there for it alone."""

    @staticmethod
    def forward(
        ctx: _Context,
        student_ND: Tensor,
        student_head_VD: Tensor,
        student_bias_V: Tensor | None,
        student: _Side,
        teacher: _Side | None,
        rows: HeadRows,
        gradients: _Gradients,
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = student_ND.device
        with gemm.bf16_as_autocast_on_cpu(device), torch.autocast(device.type, enabled=False):
            loss, ce_N, kl_N = _run(student, teacher, rows, gradients)
        ctx.gradients = gradients
        ctx.mark_non_differentiable(ce_N, kl_N)
        return loss, ce_N, kl_N

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: _Context, grad: Tensor, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "head_loss hands its gradient over in the first backward and keeps no copy; call head_loss "
                "again, or use reference.head_loss with retain_graph"
            )
        return *gradients.times(grad), None, None, None, None


def _run(
    student: _Side, teacher: _Side | None, rows: HeadRows, gradients: _Gradients
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and its rows; fills `gradients` on the way."""
    operands = student.gradient_operands()
    hidden_ND = operands[0]
    wide = accumulation_dtype(hidden_ND)
    kernel = triton_rows if hidden_ND.is_cuda and wide == torch.float32 else torch_rows
    ce_N, kl_N = torch.zeros((2, len(hidden_ND)), dtype=wide, device=hidden_ND.device)
    ce_weight_N = rows.ce_weight_N.to(wide)
    kl_weight_N = None if rows.kl_weight_N is None else rows.kl_weight_N.to(wide)
    per_row = student.bytes_per_row + (0 if teacher is None else teacher.bytes_per_row)
    chunks = list(rows.chunks(bytes_per_row=per_row))
    student_buffer_CV = student.buffer(max((len(index_C) for index_C, _ in chunks), default=0))
    gradient_buffer_CV = _gradient_buffer(student_buffer_CV, student.gradient_dtype, student.cap)
    num_kl_rows = max((len(index_C) for index_C, has_kl in chunks if has_kl), default=0)
    teacher_buffer_CU = None if teacher is None else teacher.buffer(num_kl_rows)
    for index_C, has_kl in chunks:
        student_CV = student.logits(index_C, student_buffer_CV)
        teacher_CU = kl_weight_C = None
        if has_kl and teacher is not None and teacher_buffer_CU is not None and kl_weight_N is not None:
            teacher_CU = teacher.logits(index_C, teacher_buffer_CU, student_CV)
            kl_weight_C = kl_weight_N[index_C]
        gradient_CV = gradient_buffer_CV[: len(index_C)] if gradients.any else None
        ce_C, kl_C = kernel(
            student_CV, teacher_CU, targets_C=rows.targets_N[index_C], ce_weight_C=ce_weight_N[index_C],
            kl_weight_C=kl_weight_C, student_bias_V=student.bias_V,
            teacher_bias_U=None if teacher is None else teacher.bias_V, temperature=rows.temperature,
            divergence=rows.divergence, num_common=rows.num_common, gradient_CV=gradient_CV,
            is_teacher_standard=teacher is not None and teacher.is_standard,
        )  # fmt: skip
        ce_N.index_copy_(0, index_C, ce_C)
        kl_N.index_copy_(0, index_C, kl_C)
        if gradient_CV is not None:
            through_cap_(gradient_CV, student_CV, student.cap)
            gradients.add(index_C, gradient_CV, operands)
    loss = (ce_weight_N * ce_N).sum()
    if kl_weight_N is not None:
        loss = loss + (kl_weight_N * kl_N).sum()
    return torch.where(rows.stated_counts_hold(), loss, torch.nan), ce_N, kl_N


def _gradient_buffer(logits_CV: Tensor, dtype: torch.dtype, cap: float | None) -> Tensor:
    """Room for dz: over the logits where elements are as wide; each is read before it is written.

    Beside them where there is a cap, through which dz goes with the logits at hand.
    """
    if cap is None and dtype.itemsize == logits_CV.dtype.itemsize:
        return logits_CV.view(dtype)
    return torch.empty_like(logits_CV, dtype=dtype)
