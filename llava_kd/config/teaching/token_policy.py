"""The settings of private tokens: how they are found, and what is taught of them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Interval
from typing_extensions import Doc

from llava_kd.config.ranges import NotNegativeFloat, PositiveFloat, Share, require


@dataclass(frozen=True, kw_only=True)
class SpanConfig:
    """Either `pattern`, or `regex`."""

    pattern: Annotated[str | None, Doc("Name of a built-in pattern, such as `email`.")] = None
    regex: Annotated[
        str | None, Doc("Regular expression, applied to each answer without outer white space.")
    ] = None
    score: Annotated[float, Interval(gt=0, le=1), Doc("Probability that a match is private.")] = 1.0

    def __post_init__(self) -> None:
        require(
            (self.pattern is None) != (self.regex is None),
            f"`token_policy.spans` must each have either `pattern` or `regex`; got pattern={self.pattern}, "
            f"regex={self.regex}",
        )
        if self.regex is not None:
            try:
                re.compile(self.regex)
            except re.error as error:
                raise ValueError(
                    f"`token_policy.spans[].regex` must be a regular expression; got {self.regex!r} ({error})"
                ) from None


@dataclass(frozen=True, kw_only=True)
class TokenPolicyConfig:
    """What is taught of tokens that may be private, by their score from 0 to 1: Swing Distillation."""

    spans: Annotated[list[SpanConfig], Doc("Patterns to find in the answers.")] = field(default_factory=list)
    record_spans: Annotated[bool, Doc("Also use `private_spans` of the records.")] = False
    ocr_score: Annotated[
        Share | None, Doc("Score of answer words that are in the record's `ocr_tokens`; null: not used.")
    ] = None
    temperature: Annotated[
        PositiveFloat | None,
        Doc("Teacher temperature at a score of 1; at 0 it is that of `response_kl`. Null: unchanged."),
    ] = None
    noise: Annotated[
        NotNegativeFloat,
        Doc("Noise mass added to the teacher's mass of 1, at a score of 1; drawn at every step."),
    ] = 0.0
    kl: Annotated[
        Share, Doc("Weight of the divergence at a score of 1; at 0 it is 1. A weight of 0 drops it.")
    ] = 1.0
    cross_entropy: Annotated[
        Share,
        Doc("Weight of hard labels at a score of 1; a weight above 0 removes the protection of the token."),
    ] = 0.0

    def __post_init__(self) -> None:
        require(
            bool(self.spans) or self.record_spans or bool(self.ocr_score),
            "`token_policy` needs `spans`, `record_spans` or `ocr_score`, but has none of them; set one, "
            "or set token_policy to null",
        )
