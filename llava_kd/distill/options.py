"""Terms of other methods than LLaVA-KD's: differences of logits, the visual switch, visual attention.

Each gives its weighted share of the loss and the unweighted mean for the log, over the counts of the step.

Shape legend: N selected rows, L layers, I images, M and N visual tokens of an image on the teacher's and the
student's side, D student width, E width of the teacher or of its tower.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llava_kd.batch import Batch, Counts
from llava_kd.losses.reference import RowsLoss, attention_rows
from llava_kd.models.mllm import MLLM, Prediction

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


@dataclass(frozen=True, kw_only=True)
class Switch:
    """The teacher's language path over the student's visual output; gradient flows through it to the student.

    `source`: `tower` sends the student's features through the teacher's projector (Switch-KD); `projector`
    sends the student's projected features through `width_map_DE` into the teacher's embedding space. `align`
    carries [I, M, width] from the student's grid to the teacher's, None where both have the same.
    """

    teacher: MLLM
    source: Literal["tower", "projector"] = "tower"
    align: Align | None = None
    width_map_DE: Tensor | None = None

    def __call__(self, batch: Batch, student: Prediction, features_INE: Tensor) -> Prediction:
        inputs = batch.teacher_inputs
        weight = self.teacher.language_model.get_input_embeddings().weight
        # As the teacher itself is run, so that equal visual output gives equal logits.
        with torch.autocast(weight.device.type, enabled=False):
            visual_INE = features_INE if self.source == "tower" else student.projected_IND
            visual_INE = visual_INE if self.align is None else self.align(visual_INE)
            if self.width_map_DE is None:
                visual_INE = self.teacher.project(visual_INE.to(weight.dtype))
            else:
                visual_INE = visual_INE.to(self.width_map_DE.dtype) @ self.width_map_DE
            return self.teacher.read(inputs, visual_INE.to(weight.dtype))


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
    share = (1.0 / counts.response_tokens.clamp_min(1)).float()
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
        zero = torch.zeros_like(counts.images, dtype=torch.float32)
        return zero, {"attention": zero}
    teacher_LINN = teacher.attention_LINN
    if align is not None:
        teacher_LINN = _aligned(teacher_LINN, align)
    rows_I = attention_rows(student.attention_LINN, teacher_LINN, drop_sinks=term.drop_sinks)
    mean = (rows_I * batch.student.image_is_valid_I).sum() / counts.images.clamp_min(1).float()
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
