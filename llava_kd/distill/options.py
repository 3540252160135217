"""Terms of other methods than LLaVA-KD's: differences of logits, visual attention.

Each gives its weighted share of the loss and the unweighted mean for the log, over the counts of the step.

Shape legend: N selected rows, L layers, I images, M and N visual tokens of an image on the teacher's and the
student's side, D student width, E width of the teacher or of its tower.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_kd.batch import Batch, Counts
from llava_kd.losses.reference import RowsLoss, attention_rows
from llava_kd.models.mllm import Prediction

Align = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class DBiLD:
    """Differences of logits between two predictions, on their response rows (Switch-KD)."""

    weight: float = 1.0
    temperature: float = 3.0
    candidates: int = 64


@dataclass(frozen=True, kw_only=True)
class Attention:
    """1 - cosine of visual attention, layer by layer, one value an image (CompoDistill)."""

    weight: float = 1.0
    drop_sinks: bool = True


def dbild_term(
    name: str,
    term: DBiLD,
    sides: tuple[Prediction, Prediction],
    rows: tuple[Tensor, Tensor],
    counts: Counts,
    *,
    num_common: int | None,
    dbild_loss: Callable[..., RowsLoss],
) -> tuple[Tensor, dict[str, Tensor]]:
    """`sides`: who learns and who teaches; `rows`: flat response positions of each."""
    student_ND, teacher_NE = (
        side.hidden_BTD.flatten(0, 1)[rows_N] for side, rows_N in zip(sides, rows, strict=True)
    )
    result = dbild_loss(
        student_ND,
        sides[0].head_VD,
        teacher_NE,
        sides[1].head_VD,
        student_bias_V=sides[0].bias_V,
        teacher_bias_U=sides[1].bias_V,
        temperature=term.temperature,
        candidates=term.candidates,
        num_common=num_common,
    )
    share = (1.0 / counts["response_tokens"].clamp_min(1)).float()
    return term.weight * share * result.loss, {name: share * result.rows_N.sum()}


def attention_term(
    term: Attention,
    student: Prediction,
    teacher: Prediction,
    batch: Batch,
    counts: Counts,
    align: Align | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Raises ValueError if a side does not show its attention."""
    if student.attention_LINN is None or teacher.attention_LINN is None:
        raise ValueError("the attention term needs predictions of models whose attention is watched")
    if batch.student.num_images == 0:  # the two sides' sizes of nothing need not agree
        zero = torch.zeros_like(counts["images"], dtype=torch.float32)
        return zero, {"attention": zero}
    teacher_LINN = teacher.attention_LINN
    if align is not None:
        teacher_LINN = _aligned(teacher_LINN, align)
    rows_I = attention_rows(student.attention_LINN, teacher_LINN, drop_sinks=term.drop_sinks)
    mean = (rows_I * batch.student.image_is_valid_I).sum() / counts["images"].clamp_min(1).float()
    return term.weight * mean, {"attention": mean.detach()}


def _aligned(maps_LIMM: Tensor, align: Align) -> Tensor:
    """Maps on the other grid: queries are carried over, then keys; no token sees a later one."""
    layers = []
    for maps_IMM in maps_LIMM:
        queries_INM = align(maps_IMM)
        layers.append(align(queries_INM.mT).mT.tril())
    return torch.stack(layers)


def touch(student: Prediction) -> Tensor:
    """Zero, with a zero gradient for every weight that the prediction comes from: engines wait for each.

    Sums of nothing: what a prediction holds where no term reads it cannot matter.
    """
    read = [student.hidden_BTD, student.head_VD, student.bias_V]
    return torch.stack([tensor[:0].float().sum() for tensor in read if tensor is not None]).sum()
