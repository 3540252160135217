"""The fast form of reference.dbild_loss: a few rows' logits at a time, their gradient finished on the spot.

Shape legend: N rows, V student vocabulary, U teacher vocabulary, D student width, E teacher width,
C rows of a chunk, K common columns.
"""

from __future__ import annotations

from torch import Tensor

from llava_kd.losses import reference
from llava_kd.losses.checks import check_dbild_inputs
from llava_kd.losses.kernels.summed import Side, leading_logits, sum_of_rows
from llava_kd.losses.reference import RowsLoss

_CHUNK_ROWS = 256


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
        caps=(student_cap, teacher_cap),
    )

    def rows_of(part: slice, student_CK: Tensor) -> Tensor:
        teacher = Side(teacher_NE[part].detach(), teacher_head_UE.detach(), teacher_bias_U, teacher_cap)
        return reference.dbild_rows(
            student_CK,
            leading_logits(teacher, num_common),
            temperature=temperature,
            candidates=candidates,
        )

    student = Side(student_ND, student_head_VD, student_bias_V, student_cap)
    return sum_of_rows(student, rows_of, num_columns=num_common, chunk_rows=chunk_rows)
