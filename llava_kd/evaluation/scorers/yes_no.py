"""Yes-or-no answers: POPE and MME."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def pope_says_yes(text: str) -> bool:
    """LLaVA's eval_pope.py: no where the first sentence has the word No, no or not, else yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


@dataclass(frozen=True)
class Confusion:
    """Counts with yes as the positive; a ratio without a denominator is 0 (the official code stops)."""

    tp: int
    fp: int
    tn: int
    fn: int

    @staticmethod
    def of(pairs: Iterable[tuple[bool, bool]]) -> Confusion:
        """Counts of (predicted yes, truly yes) pairs."""
        seen = list(pairs)
        return Confusion(
            tp=seen.count((True, True)),
            fp=seen.count((True, False)),
            tn=seen.count((False, False)),
            fn=seen.count((False, True)),
        )

    @property
    def total(self) -> int:
        return self.tp + self.fp + self.tn + self.fn

    @property
    def accuracy(self) -> float:
        return _ratio(self.tp + self.tn, self.total)

    @property
    def precision(self) -> float:
        return _ratio(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float:
        return _ratio(self.tp, self.tp + self.fn)

    @property
    def f1(self) -> float:
        return _ratio(2 * self.precision * self.recall, self.precision + self.recall)

    @property
    def yes_ratio(self) -> float:
        """Share of yes among the predictions."""
        return _ratio(self.tp + self.fp, self.total)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def mme_reading(text: str) -> Literal["yes", "no", "other"]:
    """MME's calculation.py: yes or no looked for, in this order, in the first four letters."""
    text = text.lower()
    if text in ("yes", "no"):
        return text
    start = text[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def mme_task_score(images: Sequence[Sequence[bool]]) -> float:
    """Percent of right answers plus percent of images with all answers right; 200 at most."""
    answers = [right for image in images for right in image]
    if not answers:
        return 0.0
    return 100 * sum(answers) / len(answers) + 100 * sum(map(all, images)) / len(images)
