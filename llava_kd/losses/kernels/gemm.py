"""Matrix products of low-precision operands with fp32 results.

On CUDA cuBLAS writes fp32 itself. Other devices have no such product: there the operands are widened, the
head a block of rows at a time, so that no fp32 copy of a whole head exists.

Shape legend: C rows of a chunk, V vocabulary, D width, W rows of a block of the head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

HEAD_ROWS_AT_A_TIME = 8192

P = ParamSpec("P")
R = TypeVar("R")


def not_compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Keep a function out of torch.compile, which in some versions decomposes addmm(out_dtype) wrongly."""
    return torch.compiler.disable(function)  # pyright: ignore[reportReturnType]


def is_half(dtype: torch.dtype) -> bool:
    """Whether a dtype has 16 bits."""
    return dtype in (torch.bfloat16, torch.float16)


def product_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast rounds the operands of products on a GPU to; None where it is off, and on a CPU."""
    if device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    return None


def tf32_on_cuda(device: torch.device, is_allowed: bool) -> AbstractContextManager[None]:
    """Let fp32 products of the block round their operands to 10 bits of fraction; bf16 ones lose nothing."""
    if device.type != "cuda" or not is_allowed:
        return nullcontext()
    return _rounding_to("tf32", torch.backends.cuda.matmul)


def bf16_as_autocast_on_cpu(device: torch.device) -> AbstractContextManager[None]:
    """Let fp32 products of the block round their operands to bf16 where autocast would; results stay fp32.

    That is what `product_dtype` does on a GPU. A processor without such products computes as before.
    """
    if device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return nullcontext()
    if torch.get_autocast_dtype("cpu") != torch.bfloat16:
        return nullcontext()
    return _rounding_to("bf16", torch.backends.mkldnn.matmul)  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def _rounding_to(precision: str, products: Any) -> Iterator[None]:
    before = products.fp32_precision
    products.fp32_precision = precision
    try:
        yield
    finally:
        products.fp32_precision = before


def write_logits(hidden_CD: Tensor, head_VD: Tensor, out_CV: Tensor) -> None:
    """Write hidden @ head.T into `out_CV`, rounding to its dtype once, at the end."""
    if out_CV.dtype == hidden_CD.dtype == head_VD.dtype and (out_CV.is_cuda or not is_half(out_CV.dtype)):
        torch.mm(hidden_CD, head_VD.T, out=out_CV)
    elif out_CV.is_cuda:
        torch.mm(hidden_CD, head_VD.T, out_dtype=out_CV.dtype, out=out_CV)
    else:
        dtype = torch.promote_types(out_CV.dtype, torch.float32)
        wide_CD = hidden_CD.to(dtype)
        for block, head_WD in _wide_blocks(head_VD, dtype):
            out_CV[:, block] = wide_CD @ head_WD.T


def wide_logits(hidden_CD: Tensor, head_VD: Tensor, dtype: torch.dtype) -> Tensor:
    """hidden @ head.T of operands widened to `dtype`, without a wide copy of the whole head."""
    wide_CD = hidden_CD.to(dtype)
    if head_VD.dtype == dtype:
        return wide_CD @ head_VD.T
    result_CV = wide_CD.new_empty((hidden_CD.shape[0], head_VD.shape[0]))
    for block, head_WD in _wide_blocks(head_VD, dtype):
        result_CV[:, block] = wide_CD @ head_WD.T
    return result_CV


def times_head(gradient_CV: Tensor, head_VD: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient @ head in `dtype`, fp32 or wider."""
    if gradient_CV.dtype == head_VD.dtype == dtype:
        return gradient_CV @ head_VD
    if gradient_CV.is_cuda:
        return torch.mm(gradient_CV, head_VD, out_dtype=dtype)
    return wide_times_head(gradient_CV, head_VD, dtype)


def wide_times_head(gradient_CV: Tensor, head_VD: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient @ head of operands widened to `dtype`, without a wide copy of the whole head."""
    if gradient_CV.dtype == head_VD.dtype == dtype:
        return gradient_CV @ head_VD
    result_CD = gradient_CV.new_zeros((gradient_CV.shape[0], head_VD.shape[1]), dtype=dtype)
    for block, head_WD in _wide_blocks(head_VD, dtype):
        result_CD.addmm_(gradient_CV[:, block].to(dtype), head_WD)
    return result_CD


def add_outer(total_VD: Tensor, gradient_CV: Tensor, hidden_CD: Tensor) -> None:
    """Add gradient.T @ hidden to `total_VD`, which is fp32 or wider."""
    if gradient_CV.is_cuda and gradient_CV.dtype != total_VD.dtype:
        hidden_CD = hidden_CD.to(gradient_CV.dtype)
        torch.addmm(total_VD, gradient_CV.T, hidden_CD, out_dtype=total_VD.dtype, out=total_VD)
    else:
        total_VD.addmm_(gradient_CV.T, hidden_CD.to(total_VD.dtype))


def _wide_blocks(head_VD: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, head_VD.shape[0], HEAD_ROWS_AT_A_TIME):
        block = slice(start, start + HEAD_ROWS_AT_A_TIME)
        yield block, head_VD[block].to(dtype)


def gram(head_VD: Tensor) -> Tensor:
    """head.T @ head in fp32, or fp64 for an fp64 head."""
    dtype = torch.promote_types(head_VD.dtype, torch.float32)
    if dtype == head_VD.dtype:
        return head_VD.T @ head_VD
    if head_VD.is_cuda:
        return torch.mm(head_VD.T, head_VD, out_dtype=dtype)
    total_DD = head_VD.new_zeros((head_VD.shape[1], head_VD.shape[1]), dtype=dtype)
    for _, head_WD in _wide_blocks(head_VD, dtype):
        total_DD.addmm_(head_WD.T, head_WD)
    return total_DD


def head_times(head_VD: Tensor, matrix_DD: Tensor, dtype: torch.dtype) -> Tensor:
    """head @ matrix in `dtype`: on CUDA the matrix is rounded to the head's, elsewhere the head widened."""
    if head_VD.is_cuda and head_VD.dtype != dtype:
        return torch.mm(head_VD, matrix_DD.to(head_VD.dtype), out_dtype=dtype)
    if head_VD.dtype == matrix_DD.dtype or head_VD.is_cuda:
        return head_VD @ matrix_DD.to(head_VD.dtype)
    result_VD = torch.empty_like(head_VD, dtype=dtype)
    for block, head_WD in _wide_blocks(head_VD, matrix_DD.dtype):
        result_VD[block] = head_WD @ matrix_DD
    return result_VD


def times_wide(rows_CD: Tensor, matrix_DK: Tensor) -> Tensor:
    """rows @ matrix with a wide matrix, to about its precision.

    16-bit rows on CUDA meet the matrix as a sum of two 16-bit ones (the rounded matrix and what rounding
    left): two fast products, for an error near 1e-6 where rounding alone would leave 1e-3.
    """
    if not (rows_CD.is_cuda and is_half(rows_CD.dtype)):
        return rows_CD.to(matrix_DK.dtype) @ matrix_DK
    high_DK = matrix_DK.to(rows_CD.dtype)
    low_DK = (matrix_DK - high_DK).to(rows_CD.dtype)
    result_CK = torch.mm(rows_CD, high_DK, out_dtype=matrix_DK.dtype)
    return torch.addmm(result_CK, rows_CD, low_DK, out_dtype=matrix_DK.dtype, out=result_CK)
