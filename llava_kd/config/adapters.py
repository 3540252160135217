"""The settings of adapters and of weights in few bits, and what they need of the others."""

from __future__ import annotations

from dataclasses import dataclass

from llava_kd.config.checks import require


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters of the language model, which is then trained through them alone.

    `targets`: names of linear layers of the decoder, such as q_proj; null is all of them.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: list[str] | None = None

    def __post_init__(self) -> None:
        require(self.targets != [], "`student.lora.targets` is empty; name some layers, or set it to null")


def check_adapters(
    *, has_lora: bool, quantize: str | None, trains_language_model: bool, engine_kind: str
) -> None:
    """ValueError where the student's adapters and bits do not fit what is trained, or by what."""
    require(
        not has_lora or trains_language_model,
        "`student.lora` adapts the language model, which `trainable` does not name; add language_model to "
        "it, or set student.lora to null",
    )
    require(
        quantize is None or has_lora,
        f"`student.quantize` is {quantize}: weights of few bits cannot be trained; set student.lora "
        "as well, or student.quantize to null",
    )
    require(
        quantize is None or engine_kind in ("auto", "single", "ddp"),
        f"`student.quantize` is {quantize}, whose packed weights `engine.kind` {engine_kind} cannot shard; "
        "use auto, single or ddp",
    )


def check_teacher_bits(quantize: str | None, placement: str) -> None:
    require(
        quantize is None or placement == "replicated",
        f"`teacher.quantize` is {quantize}, whose packed weights stay where they are; set "
        f"teacher.placement to replicated instead of {placement}, or teacher.quantize to null",
    )
