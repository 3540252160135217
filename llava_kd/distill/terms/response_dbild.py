"""Differences of logits between student and teacher on response rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llava_kd.distill.terms.dbild import DBiLD
from llava_kd.distill.terms.seen import Seen
from llava_kd.distill.terms.term import Reads


@dataclass(frozen=True, kw_only=True)
class ResponseDBiLD(DBiLD):
    label: ClassVar[str] = "differences of response logits, against the teacher; nats a token"

    @property
    def reads(self) -> Reads:
        return Reads(teacher="states", places=("response",), vocabulary=True)

    def total(self, seen: Seen) -> Tensor:
        return self.difference(seen, seen.states("response"), seen.heads())
