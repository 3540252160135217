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

    pattern: Annotated[str | None, Doc("Name of a pattern that comes with the package, such as `email`.")] = (
        None
    )
    regex: Annotated[str | None, Doc("Regular expression over each answer, without outer white space.")] = (
        None
    )
    score: Annotated[float, Interval(gt=0, le=1), Doc("How likely what it finds is private.")] = 1.0

    def __post_init__(self) -> None:
        require(
            (self.pattern is None) != (self.regex is None),
            f"`token_policy.spans` needs `pattern` or `regex` each; got pattern={self.pattern}, "
            f"regex={self.regex}",
        )
        if self.regex is not None:
            try:
                re.compile(self.regex)
            except re.error as error:
                raise ValueError(
                    f"`token_policy.spans[].regex` must be a regular expression; {self.regex!r} is none "
                    f"({error})"
                ) from None


@dataclass(frozen=True, kw_only=True)
class TokenPolicyConfig:
    """What is taught of tokens that may be private, by their score from 0 to 1: Swing Distillation."""

    spans: Annotated[list[SpanConfig], Doc("What is looked for in the answers.")] = field(
        default_factory=list
    )
    record_spans: Annotated[bool, Doc("Read `private_spans` of the records too.")] = False
    ocr_score: Annotated[
        Share | None, Doc("Score of words of `ocr_tokens` of a record in its answers; null: not read.")
    ] = None
    temperature: Annotated[
        PositiveFloat | None,
        Doc("Of the teacher alone at a score of 1, from `response_kl`'s at 0; null: as elsewhere."),
    ] = None
    noise: Annotated[
        NotNegativeFloat, Doc("Mass of noise beside the teacher's 1, at a score of 1; drawn at every step.")
    ] = 0.0
    kl: Annotated[Share, Doc("Weight of the divergence at a score of 1, from 1 at 0; 0 drops.")] = 1.0
    cross_entropy: Annotated[
        Share, Doc("Weight of hard labels at a score of 1; above 0 it voids what protects the token.")
    ] = 0.0

    def __post_init__(self) -> None:
        require(
            bool(self.spans) or self.record_spans or bool(self.ocr_score),
            "`token_policy` looks for nothing; give it `spans`, `record_spans` or `ocr_score`, or set it to "
            "null",
        )
