"""Judgement of MMMU's open questions, by the rule of the authors' eval_utils.py."""

from __future__ import annotations

import re
from collections.abc import Sequence

_CUES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = frozenset(":,.!?;'")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def normalise_open(text: str) -> list[str | float]:
    """A number rounded to two decimals, or lower-case text; one letter is padded against chance matches."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [" " + text, text + " "] if len(text) == 1 else [text]


def key_phrases(response: str) -> list[str]:
    """The shortest tail after a cue word of each line; the whole response where there is none."""
    response = response.strip().strip(".").lower()
    lines = response.split("\n")
    phrases = []
    for number, line in enumerate(lines, start=1):
        cues = (*_CUES, "=") if number == len(lines) else _CUES
        tails = [line.split(cue)[-1].strip() for cue in cues if cue in line]
        shortest = _shortest(tails)
        if shortest and shortest not in _TRIVIAL:
            phrases.append(shortest)
    return phrases or [response]


def _shortest(tails: Sequence[str]) -> str:
    """As the official loop finds it: an empty tail is replaced by the next one, whatever that is."""
    best = ""
    for tail in tails:
        if not best or len(tail) < len(best):
            best = tail
    return best


def parse_open(response: str) -> set[str | float]:
    """Everything in a response that may be its answer."""
    phrases = key_phrases(response)
    numbers = [number for phrase in phrases for form in _NUMBERS for number in form.findall(phrase)]
    return {value for text in (*phrases, *numbers) for value in normalise_open(text)}


def is_open_correct(response: str, gold: str | Sequence[str]) -> bool:
    """Whether a number equals a gold one, or a gold text is part of a predicted one."""
    return matches_gold(parse_open(response), gold)


def matches_gold(predictions: set[str | float], gold: str | Sequence[str]) -> bool:
    golds = [gold] if isinstance(gold, str) else gold
    wanted = [value for text in golds for value in normalise_open(str(text))]
    texts = [value for value in wanted if isinstance(value, str)]
    return any(
        any(text in value for text in texts) if isinstance(value, str) else value in wanted
        for value in predictions
    )
