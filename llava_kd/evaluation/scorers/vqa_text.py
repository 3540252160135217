"""Normalisation and soft accuracy of short VQA answers.

`normalise_vqa` is the rule of the VQA and VizWiz servers (GT-Vision-Lab/VQA, vqaEval.py), `normalise_m4c`
the EvalAI processor of mmf, which TextVQA and LLaVA's own converters use. Their oddities are kept: a period
after a digit goes too, at most 32 periods go, "none" is 0, and "somebody'd" loses its apostrophe.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_HAS_PUNCTUATION = re.compile("[" + re.escape(_PUNCTUATION) + ".]")
_DIGIT_COMMA = re.compile(r"\d,\d")
# The published lookbehind is mistyped, so that only what follows protects a period.
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32  # re.UNICODE, which the published code passes as the count
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
    "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_ARTICLES = frozenset(("a", "an", "the"))
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
you've
"""


def _contractions() -> dict[str, str]:
    """Every form with one apostrophe left out, mapped to the full form."""
    table = {"somebody'd": "somebodyd"}
    for full in _CONTRACTED.split():
        for place in (k for k, letter in enumerate(full) if letter == "'"):
            table[full[:place] + full[place + 1 :]] = full
    return table


CONTRACTIONS = _contractions()


def strip_punctuation(text: str) -> str:
    """Marks deleted where they touch a space (or the text has 1,000), else turned into a space."""
    if not _HAS_PUNCTUATION.search(text):
        return text
    result = text
    has_digit_comma = _DIGIT_COMMA.search(text) is not None
    for mark in _PUNCTUATION:
        if mark in text:
            is_loose = has_digit_comma or mark + " " in text or " " + mark in text
            result = result.replace(mark, "" if is_loose else " ")
    return _PERIOD.sub("", result, count=_MOST_PERIODS)


def map_words(text: str) -> str:
    """Lower case, number words as digits, articles out, apostrophes of contractions back in."""
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def flatten(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=1 << 18)
def normalise_vqa(text: str) -> str:
    """An answer as the VQA and VizWiz servers compare it."""
    return map_words(strip_punctuation(flatten(text)))


@lru_cache(maxsize=1 << 18)
def normalise_m4c(text: str) -> str:
    """An answer as the M4C (EvalAI) processor compares it."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return map_words(strip_punctuation(flatten(text)))


def soft_accuracy(matches: int, humans: int) -> float:
    """Mean over the humans left out in turn of min(1, matches among the others / 3)."""
    if humans == 0:
        return 0.0
    with_match_out = min(1.0, (matches - 1) / 3) if matches else 0.0
    return (matches * with_match_out + (humans - matches) * min(1.0, matches / 3)) / humans


def vqa_accuracy(prediction: str, humans: Sequence[str], *, skip_identical: bool = True) -> float:
    """VQAv2 accuracy. Where all humans agree the official code normalises nothing: `skip_identical`.

    The official code also merges annotations that are equal in every key; humans are counted one by one here.
    """
    raw = [flatten(human) for human in humans]
    if skip_identical and is_identical(raw):
        return soft_accuracy(raw.count(flatten(prediction)), len(raw))
    target = normalise_vqa(prediction)
    return soft_accuracy(sum(normalise_vqa(human) == target for human in raw), len(raw))


def is_identical(humans: Sequence[str]) -> bool:
    return len(set(humans)) == 1


def vizwiz_accuracy(prediction: str, humans: Sequence[str]) -> float:
    """VizWiz accuracy: the prediction is normalised, the humans' answers are not."""
    return soft_accuracy(list(humans).count(normalise_vqa(prediction)), len(humans))


def textvqa_accuracy(prediction: str, humans: Sequence[str]) -> float:
    """TextVQA accuracy: both sides through the M4C processor, exactly ten humans."""
    if len(humans) != 10:
        raise ValueError(f"TextVQA needs 10 human answers, got {len(humans)}")
    target = normalise_m4c(prediction)
    return soft_accuracy(sum(normalise_m4c(human) == target for human in humans), 10)
