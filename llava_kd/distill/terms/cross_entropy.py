"""Next-token cross-entropy over response targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llava_kd.distill.terms.term import HeadRequest, Reads, Term


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Term):
    label: ClassVar[str] = "next response token, against the data; nats a token"
    paper: ClassVar[str] = "LLaVA-KD, arXiv 2410.16236, L_reg"

    @property
    def reads(self) -> Reads:
        return Reads(places=("response",))

    def head_request(self) -> HeadRequest:
        return HeadRequest(place="response")
