"""Exact-match accuracy of short answers, in all and by question type."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class ExactScore:
    accuracy: float
    count: int
    by_type: dict[str, float]
    count_by_type: dict[str, int]


def normalise(answer: str) -> str:
    """Lower case, without outer space and final periods: a model may write a sentence for a word.

    In composed Unicode, which is all that many tokenizers read and write.
    """
    return unicodedata.normalize("NFC", answer).strip().lower().rstrip(".").strip()


def is_correct(answer: str, truth: str) -> bool:
    return normalise(answer) == normalise(truth)


def score_exact(answers: Iterable[dict[str, str]]) -> ExactScore:
    """Share of answers (keys "type", "truth", "answer") equal to their truth."""
    right: dict[str, int] = defaultdict(int)
    count: dict[str, int] = defaultdict(int)
    for item in answers:
        count[item["type"]] += 1
        right[item["type"]] += is_correct(item["answer"], item["truth"])
    total = sum(count.values())
    if total == 0:
        raise ValueError("no answer to score")
    kinds = sorted(count)
    return ExactScore(
        accuracy=sum(right.values()) / total,
        count=total,
        by_type={kind: right[kind] / count[kind] for kind in kinds},
        count_by_type={kind: count[kind] for kind in kinds},
    )
