"""Which words of a record's answers are private, and how likely that makes each of its tokens.

Three taggers: regular expressions over each answer; spans that the record itself names, in its field
`private_spans`; and the words of its pictures, in its field `ocr_tokens`. A token has the largest score of
the characters that it covers. Characters are those of an answer without outer white space.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llava_kd.data.sources.conversation import OCR_TOKENS, PRIVATE_SPANS, Record
from llava_kd.data.text.encoder import Encoded

# Plain forms that anybody would tag; what is private in your data you know better.
PATTERNS: Mapping[str, str] = {
    "email": r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+",
    "phone": r"\+?\d[\d ()/.-]{5,17}\d",
    "digits": r"\d{4,}",
    "card": r"\b\d{4}(?:[ -]?\d{4}){2}[ -]?\d{1,7}\b",
    "iban": r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}\b",
    "ip": r"\b\d{1,3}(?:\.\d{1,3}){3}\b",
}
Span = tuple[int, int, int, float]  # number of the answer, its first character and the one behind, score


@dataclass(frozen=True, kw_only=True)
class Tagger:
    """`patterns`: expressions with the score of what they find. `reads_spans`: those of the record.

    `ocr_score` of what stands in a picture and in an answer; None is not asked.
    """

    patterns: tuple[tuple[str, float], ...] = ()
    reads_spans: bool = False
    ocr_score: float | None = None

    def __call__(self, record: Record, encoded: Encoded) -> Encoded:
        """The same with the score of each token. ValueError, naming the record, for spans of no answer."""
        answers = [turn.text for turn in record.turns if turn.role == "assistant"]
        try:
            spans = [*self._found(answers)]
            if self.reads_spans:
                spans += _named(record, answers)
            if self.ocr_score is not None:
                spans += _in_pictures(record, answers, self.ocr_score)
        except ValueError as error:
            raise ValueError(f"record {record.id!r}: {error}") from None
        return replace(encoded, scores=_scores(encoded, answers, spans))

    @property
    def fingerprint(self) -> str:
        """Of everything that decides the scores of a record."""
        return hashlib.sha256(repr(self).encode()).hexdigest()

    def _found(self, answers: list[str]) -> Iterator[Span]:
        for pattern, score in self.patterns:
            for number, text in enumerate(answers):
                for found in re.finditer(pattern, text):
                    yield number, found.start(), found.end(), score


def _listed(record: Record, field: str) -> list:
    held = record.extra.get(field)
    if held is None:
        return []
    try:
        listed = json.loads(held)
    except ValueError:
        listed = None
    if not isinstance(listed, list):
        raise ValueError(f"`{field}` must be a list; got {held[:80]!r}")
    return listed


def _named(record: Record, answers: list[str]) -> Iterator[Span]:
    for place, one in enumerate(_listed(record, PRIVATE_SPANS)):
        where = f"`{PRIVATE_SPANS}[{place}]`"
        if not isinstance(one, dict) or (not {"text"} <= one.keys() and not {"start", "stop"} <= one.keys()):
            raise ValueError(f"{where} must have `text`, or `answer`, `start` and `stop`; got {one!r:.80}")
        score = one.get("score", 1.0)
        if isinstance(score, bool) or not isinstance(score, int | float) or not 0 < score <= 1:
            raise ValueError(f"{where}.score must be above 0 and at most 1; got {score!r:.80}")
        if "text" in one:
            yield from _of_text(one["text"], answers, float(score), where)
            continue
        number, start, stop = one.get("answer", 0), one["start"], one["stop"]
        if any(isinstance(n, bool) or not isinstance(n, int) for n in (number, start, stop)):
            raise ValueError(
                f"{where} must have whole numbers as `answer`, `start` and `stop`; got {one!r:.80}"
            )
        if not 0 <= number < len(answers):
            raise ValueError(f"{where}.answer must be from 0 to {len(answers) - 1}; got {number}")
        if not 0 <= start < stop <= len(answers[number]):
            raise ValueError(
                f"{where} must lie inside its answer of {len(answers[number])} characters; got {start} to "
                f"{stop}"
            )
        yield number, start, stop, float(score)


def _of_text(text: object, answers: list[str], score: float, where: str) -> Iterator[Span]:
    if not isinstance(text, str) or not text:
        raise ValueError(f"{where}.text must be words of an answer; got {text!r:.80}")
    found = list(_places(text, answers))
    if not found:
        raise ValueError(f"{where}.text must occur in an answer; {text[:80]!r} occurs in none")
    yield from ((*place, score) for place in found)


def _in_pictures(record: Record, answers: list[str], score: float) -> Iterator[Span]:
    """Whole words alone: a picture that says `a` makes no `banana` private."""
    for one in _listed(record, OCR_TOKENS):
        text = one.get("text") if isinstance(one, dict) else one
        if not isinstance(text, str):
            raise ValueError(f"`{OCR_TOKENS}` must hold texts, or objects with `text`; got {one!r:.80}")
        for number, start, stop in _places(text.strip(), answers):
            around = answers[number][:start][-1:], answers[number][stop:][:1]
            if not any(character.isalnum() for character in around):
                yield number, start, stop, score


def _places(text: str, answers: list[str]) -> Iterator[tuple[int, int, int]]:
    if text:
        for number, answer in enumerate(answers):
            for found in re.finditer(re.escape(text), answer):
                yield number, found.start(), found.end()


def _scores(encoded: Encoded, answers: list[str], spans: list[Span]) -> Tensor:
    scores = torch.zeros(len(encoded.ids))
    if not spans:
        return scores
    of_characters = [torch.zeros(len(answer)) for answer in answers]
    for number, start, stop, score in spans:
        part = of_characters[number][start:stop]
        torch.maximum(part, torch.tensor(score), out=part)
    for place, (number, first, last, _) in enumerate(encoded.spans.tolist()):
        if last > first:
            scores[place] = of_characters[number][first:last].max()
    return scores
