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

    rank: Annotated[PositiveInt, Doc("Rank of each adapter.")] = 16
    alpha: Annotated[PositiveFloat, Doc("Adapters are scaled by alpha / rank.")] = 32.0
    dropout: Annotated[
        float, Interval(ge=0, lt=1), Doc("Dropout on the input of each adapter, in training.")
    ] = 0.0
    targets: Annotated[
        list[str] | None,
        MinLen(1),
        Doc("Names of linear layers of the decoder to adapt, such as q_proj; null: all of them."),
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
        f"`{whose}.lora` adapts the language model, but `trainable` does not name it; add language_model "
        f"to `trainable`, or set {whose}.lora to null",
    )
    require(
        quantize is None or has_lora,
        f"`{whose}.quantize` is {quantize}: quantized weights cannot be trained; set {whose}.lora as well, "
        f"or {whose}.quantize to null",
    )
    require(
        quantize is None or engine_kind in ("auto", "single", "ddp"),
        f"`{whose}.quantize` is {quantize}, but `engine.kind` {engine_kind} cannot shard quantized "
        "weights; use auto, single or ddp",
    )


def check_teacher_bits(quantize: str | None, placement: str) -> None:
    require(
        quantize is None or placement == "replicated",
        f"`teacher.quantize` is {quantize}, but quantized weights cannot be moved between devices; set "
        f"teacher.placement to replicated instead of {placement}, or teacher.quantize to null",
    )
