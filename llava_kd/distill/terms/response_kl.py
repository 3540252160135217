"""The divergence from the teacher at response targets, as cross-entropy is taken at them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llava_kd.distill.rows import Place
from llava_kd.distill.terms.kl import KL


@dataclass(frozen=True, kw_only=True)
class ResponseKL(KL):
    label: ClassVar[str] = "response tokens, against the teacher; nats a token"
    paper: ClassVar[str] = "LLaVA-KD, arXiv 2410.16236, L_res"
    place: ClassVar[Place] = "response"
