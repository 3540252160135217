"""1 - cosine of the attention between visual tokens, summed over middle layers, one value an image.

Shape legend: I images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Interval
from torch import Tensor
from typing_extensions import Doc

from llava_kd.distill.terms.seen import Seen
from llava_kd.distill.terms.term import IMAGES, Denominator, Reads, Term
from llava_kd.losses.reference import attention_rows


@dataclass(frozen=True, kw_only=True)
class Attention(Term):
    first: Annotated[float, Interval(ge=0, le=1), Doc("Layers from this share of the decoder's depth.")] = 0.3
    last: Annotated[float, Interval(ge=0, le=1), Doc("To below this share of it.")] = 0.7
    drop_sinks: Annotated[bool, Doc("Leave out entries above mean + deviation of either side.")] = True

    label: ClassVar[str] = "between visual tokens, against the teacher; sum of 1 - cosine over layers"
    paper: ClassVar[str] = "CompoDistill, arXiv 2510.12184"
    denominator: ClassVar[Denominator] = IMAGES

    def __post_init__(self) -> None:
        if not self.first < self.last:
            raise ValueError(
                f"`objective.attention.first` ({self.first:g}) must be less than `last` ({self.last:g})"
            )

    @property
    def reads(self) -> Reads:
        return Reads(teacher="model", grids=True, attention=(self.first, self.last))

    def total(self, seen: Seen) -> Tensor:
        rows_I = attention_rows(*seen.attention_maps(), drop_sinks=self.drop_sinks)
        return (rows_I * seen.is_valid_I).sum()
