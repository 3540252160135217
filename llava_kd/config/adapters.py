"""The settings of adapters and of weights in few bits, and what they need of the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Interval, MinLen
from typing_extensions import Doc

from llava_kd.config.ranges import PositiveFloat, PositiveInt, require


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters of the language model, which is then trained through them alone."""

    rank: Annotated[PositiveInt, Doc("Width of an adapter.")] = 16
    alpha: Annotated[PositiveFloat, Doc("Adapters are scaled by alpha / rank.")] = 32.0
    dropout: Annotated[float, Interval(ge=0, lt=1), Doc("Of an adapter's input, in training.")] = 0.0
    targets: Annotated[
        list[str] | None,
        MinLen(1),
        Doc("Names of linear layers of the decoder, such as q_proj; null is all of them."),
    ] = None


def check_adapters(
    *,
    has_lora: bool,
    quantize: str | None,
    trains_language_model: bool,
    engine_kind: str,
    whose: str = "student",
) -> None:
    """ValueError where a student's adapters and bits do not fit what is trained, or by what."""
    require(
        not has_lora or trains_language_model,
        f"`{whose}.lora` adapts the language model, which `trainable` does not name; add language_model to "
        f"it, or set {whose}.lora to null",
    )
    require(
        quantize is None or has_lora,
        f"`{whose}.quantize` is {quantize}: weights of few bits cannot be trained; set {whose}.lora "
        f"as well, or {whose}.quantize to null",
    )
    require(
        quantize is None or engine_kind in ("auto", "single", "ddp"),
        f"`{whose}.quantize` is {quantize}, whose packed weights `engine.kind` {engine_kind} cannot shard; "
        "use auto, single or ddp",
    )


def check_teacher_bits(quantize: str | None, placement: str) -> None:
    require(
        quantize is None or placement == "replicated",
        f"`teacher.quantize` is {quantize}, whose packed weights stay where they are; set "
        f"teacher.placement to replicated instead of {placement}, or teacher.quantize to null",
    )
