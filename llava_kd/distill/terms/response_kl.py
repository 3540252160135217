"""The divergence from the teacher at response targets, as cross-entropy is taken at them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from annotated_types import Interval
from typing_extensions import Doc

from llava_kd.distill.rows import Place
from llava_kd.distill.terms.kl import KL
from llava_kd.distill.terms.term import HeadRequest, Reads, Trust


@dataclass(frozen=True, kw_only=True)
class ResponseKL(KL):
    trust: Annotated[
        Trust,
        Doc("Where the teacher is followed: all tokens, or as docs/options.md and docs/methods say."),
    ] = "all"
    listed: Annotated[
        int, Interval(ge=1, le=1000), Doc("How many of the teacher's largest logits `trust` looks through.")
    ] = 5

    label: ClassVar[str] = "response tokens, against the teacher; nats a token"
    paper: ClassVar[str] = "LLaVA-KD, arXiv 2410.16236, L_res"
    place: ClassVar[Place] = "response"

    @property
    def reads(self) -> Reads:
        return replace(super().reads, labels=self.trust != "all")

    def head_request(self) -> HeadRequest:
        return replace(super().head_request(), trust=self.trust, listed=self.listed)
