"""What the terms of one objective share: the formulas, fast or plain, and how the two models line up.

Shape legend: I images, M and N visual tokens of an image on the teacher's and the student's side, E width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from llava_kd.losses import dbild, head_loss, label, reference, reference_top_k, relation, top_k
from llava_kd.losses.cross import projection, stretches
from llava_kd.losses.cross.projection import Projection
from llava_kd.losses.cross.stretches import StretchLoss, Words
from llava_kd.losses.label import LabelRows
from llava_kd.losses.reference import HeadLoss, RowsLoss
from llava_kd.losses.tuning import information, smoothing
from llava_kd.losses.tuning.information import Centroids

Align = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Formulas:
    head_loss: Callable[..., HeadLoss]
    top_k_head_loss: Callable[..., HeadLoss]
    relation_rows: Callable[..., Tensor]
    dbild_loss: Callable[..., RowsLoss]
    label_rows: Callable[..., LabelRows]
    conditional_information: Callable[..., RowsLoss]
    smoothing: Callable[..., RowsLoss]
    stretch_loss: Callable[..., StretchLoss]
    projected_loss: Callable[..., StretchLoss]


REFERENCE = Formulas(
    head_loss=reference.head_loss,
    top_k_head_loss=reference_top_k.top_k_head_loss,
    relation_rows=reference.relation_rows,
    dbild_loss=reference.dbild_loss,
    label_rows=label.label_rows,
    conditional_information=information.conditional_information,
    smoothing=smoothing.smoothing,
    stretch_loss=stretches.stretch_loss,
    projected_loss=projection.projected_loss,
)
FAST = Formulas(
    head_loss=head_loss.head_loss,
    top_k_head_loss=top_k.top_k_head_loss,
    relation_rows=relation.relation_rows,
    dbild_loss=dbild.dbild_loss,
    label_rows=label.label_rows_by_chunk,
    conditional_information=information.conditional_information_by_chunk,
    smoothing=smoothing.smoothing_without_logits,
    stretch_loss=stretches.stretch_loss_by_chunk,
    projected_loss=projection.projected_loss_by_chunk,
)
FORMULAS: Mapping[str, Formulas] = {"fast": FAST, "reference": REFERENCE}


@dataclass(frozen=True, kw_only=True)
class Common:
    """`num_common` is the number of vocabulary columns that both heads share; `align` carries the teacher's
    features of each image, [I, M, E], to the student's tokens, None where both have the same;
    `stage_align` does so with the states of a stage of the student's own tower. `centroids`:
    what the student said before it was tuned, by label. `words`: which columns are the same token, where the
    heads share none by their number; `projection`: where the tokens of one side go on the other.
    """

    num_common: int | None = None
    align: Align | None = None
    stage_align: Align | None = None
    centroids: Centroids | None = None
    words: Words | None = None
    projection: Projection | None = None
    formulas: Formulas = REFERENCE
