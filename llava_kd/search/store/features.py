"""What records look like, as a few figures, and how alike two data sets are."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

# How a figure is compared: on which scale, and which difference on it counts as wholly unlike.
_LOG10, _LOG2, _PLAIN = "log10", "log2", "plain"
FEATURES: Mapping[str, tuple[str, float]] = {
    "records": (_LOG10, 2.0),
    "answers a record": (_LOG2, 2.0),
    "pictures a record": (_PLAIN, 1.0),
    "words a question": (_LOG2, 3.0),
    "words an answer": (_LOG2, 3.0),
    "answers of one word": (_PLAIN, 0.5),
    "distinct answers": (_PLAIN, 0.5),
    "yes or no": (_PLAIN, 0.5),
    "numbers": (_PLAIN, 0.5),
    "picture side": (_LOG2, 2.0),
    "longer side by shorter": (_PLAIN, 1.0),
}
TYPES = ("what", "which", "where", "who", "why", "how many", "how", "yes or no", "request", "other")
_ASKS_YES_NO = ("is", "are", "was", "were", "do", "does", "did", "can", "has", "have", "will", "could")
_REQUESTS = ("describe", "give", "provide", "write", "explain", "list", "name", "count", "tell", "read")
_REACH = 0.2


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A record: question and answer of each turn, and how many pictures it has."""

    talk: Sequence[tuple[str, str]]
    num_pictures: int


def describe(records: Iterable[Seen], sizes: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Figures of records, and of the width and height of some of their pictures.

    ValueError without an answer.
    """
    seen = list(records)
    talk = [turn for record in seen for turn in record.talk]
    if not talk:
        raise ValueError("the data must contain answers, but has none; give records with conversations")
    answers = [answer.strip().lower().rstrip(".") for _, answer in talk]
    types = Counter(question_type(question) for question, _ in talk)
    found = {
        "records": float(len(seen)),
        "answers a record": len(talk) / len(seen),
        "pictures a record": statistics.fmean(record.num_pictures for record in seen),
        "words a question": statistics.fmean(len(question.split()) for question, _ in talk),
        "words an answer": statistics.fmean(len(answer.split()) for answer in answers),
        "answers of one word": statistics.fmean(len(answer.split()) == 1 for answer in answers),
        "distinct answers": len(set(answers)) / len(answers),
        "yes or no": statistics.fmean(answer in ("yes", "no") for answer in answers),
        "numbers": statistics.fmean(answer.isdecimal() for answer in answers),
        **{f"asks: {kind}": types[kind] / len(talk) for kind in TYPES},
    }
    if sizes:
        found["picture side"] = statistics.median(math.sqrt(w * h) for w, h in sizes)
        found["longer side by shorter"] = statistics.median(max(size) / min(size) for size in sizes)
    return found


def question_type(question: str) -> str:
    """By its first words, which is little, and the same for every data set."""
    words = question.replace("<image>", " ").lower().replace(",", " ").split()
    if not words:
        return "other"
    if words[0] == "how":
        return "how many" if words[1:2] == ["many"] else "how"
    if words[0] in _ASKS_YES_NO:
        return "yes or no"
    if words[0] in _REQUESTS:
        return "request"
    return words[0] if words[0] in TYPES else "other"


def distance(first: Mapping[str, float], second: Mapping[str, float]) -> float:
    """From 0, the same, to 1: a mean over the features that both have, the question types being one."""
    parts = [
        min(1.0, abs(_scaled(first[name], scale) - _scaled(second[name], scale)) / whole)
        for name, (scale, whole) in FEATURES.items()
        if name in first and name in second
    ]
    kinds = [f"asks: {kind}" for kind in TYPES]
    parts.append(sum(abs(first.get(kind, 0.0) - second.get(kind, 0.0)) for kind in kinds) / 2)
    return statistics.fmean(parts)


def similarity(first: Mapping[str, float], second: Mapping[str, float]) -> float:
    """1 for the same, 0.37 at a distance of 0.2, next to nothing beyond 0.4."""
    return math.exp(-((distance(first, second) / _REACH) ** 2))


def _scaled(value: float, scale: str) -> float:
    if scale == _LOG10:
        return math.log10(1 + value)
    return math.log2(1 + value) if scale == _LOG2 else value
