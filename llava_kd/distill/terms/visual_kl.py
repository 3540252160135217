"""The divergence from the teacher at the visual tokens themselves: their own output, not shifted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llava_kd.distill.rows import Place
from llava_kd.distill.terms.kl import KL
from llava_kd.distill.terms.term import VISUAL_TOKENS, Denominator


@dataclass(frozen=True, kw_only=True)
class VisualKL(KL):
    label: ClassVar[str] = "visual tokens, against the teacher; nats a token"
    paper: ClassVar[str] = "LLaVA-KD, arXiv 2410.16236, L_vis"
    denominator: ClassVar[Denominator] = VISUAL_TOKENS
    place: ClassVar[Place] = "visual"
