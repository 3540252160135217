"""How far states of the student are from states of the teacher, row by row (hints, FitNets, arXiv 1412.6550).

`mse` is the mean over the width of the squared difference, `cosine` is 1 - cos. There is one form: no head is
involved, and autograd keeps no more than the states.

Shape legend: N rows, E width.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn.functional import cosine_similarity

from llava_kd.losses.reference import accumulation_dtype

Kind = Literal["mse", "cosine"]


def hint_rows(student_NE: Tensor, teacher_NE: Tensor, kind: Kind) -> Tensor:
    """[N], fp32 or wider. The teacher receives no gradient. ValueError where the sides differ in shape."""
    if student_NE.ndim != 2 or student_NE.shape != teacher_NE.shape:
        raise ValueError(
            "a hint compares states [rows, width] of one shape; got student "
            f"{list(student_NE.shape)}, teacher {list(teacher_NE.shape)}"
        )
    dtype = accumulation_dtype(student_NE)
    student_NE, teacher_NE = student_NE.to(dtype), teacher_NE.detach().to(dtype)
    if kind == "mse":
        return (student_NE - teacher_NE).square().mean(1)
    return 1 - cosine_similarity(student_NE, teacher_NE, dim=1)
