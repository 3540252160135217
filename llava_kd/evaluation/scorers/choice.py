"""Which option a free-form answer to a multiple-choice question names."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_SQA_PHRASE = re.compile(r"The answer is ([A-Z]).")
_SQA_LETTERS = "ABCDE"


def scienceqa_option(text: str, num_choices: int) -> int:
    """Index by LLaVA's eval_science_qa.py, or -1: a bare letter, "B. ...", or one "The answer is B."."""
    if text in tuple(_SQA_LETTERS):
        letter = text
    elif len(text) >= 3 and text[0] in _SQA_LETTERS and text[1:3] == ". ":
        letter = text[0]
    else:
        found = _SQA_PHRASE.findall(text)
        letter = found[0] if len(found) == 1 else ""
    index = _SQA_LETTERS.find(letter) if letter else -1
    return index if index < num_choices else -1


_LATIN_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
# Chinese full stop, commas, colons, brackets and quotes, and the full-width letters A to E.
_CHINESE_MARKS = str.maketrans(
    dict.fromkeys(
        "\u3002\uff0c\u3001\uff1b\uff1a\uff01\uff1f\uff08\uff09\u3010\u3011\u300a\u300b\u201c\u201d"
        "\u2018\u2019\u300c\u300d\u300e\u300f\uff0e",
        " ",
    )
    | {chr(0xFF21 + k): "ABCDE"[k] for k in range(5)}
)
_CHINESE_RUN = re.compile("([\u4e00-\u9fff]+)")
_ANSWER_IS = re.compile(r"\banswer\s+is:?\s*\(?([A-Z])\b", re.IGNORECASE)


def mmbench_option(answer: str, options: Mapping[str, str], *, chinese: bool = True) -> str:
    """Letter that an answer names by MMBench's rule without a judge, or "" (wrong).

    A single option letter that stands alone within the last four words; else "answer is X"; else the only
    option whose text the answer contains. `chinese` also takes Chinese punctuation and script for word
    borders, which the published rule does not: there every "B\u3002" and "\u9009B" is lost.
    """
    plain = answer.translate(_CHINESE_MARKS) if chinese else answer
    plain = plain.translate(_LATIN_MARKS)
    words = (_CHINESE_RUN.sub(r" \1 ", plain) if chinese else plain).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and words.index(letters[0]) > len(words) - 5:
        return letters[0]
    phrases = {letter for letter in _ANSWER_IS.findall(plain) if letter in options}
    if len(phrases) == 1:
        return phrases.pop()
    low = answer.lower()
    if len(low) > 2 * sum(len(text) for text in options.values()):
        return ""
    named = [letter for letter, text in options.items() if text.lower() in low]
    return named[0] if len(named) == 1 else ""


@dataclass(frozen=True)
class Choice:
    """A parsed MMMU choice; `is_guess` where nothing was found."""

    letter: str
    is_guess: bool = False


def mmmu_choice(
    response: str,
    choices: Sequence[str],
    texts: Mapping[str, str],
    *,
    guess: random.Random | None = None,
) -> Choice:
    """Option by the MMMU authors' eval_utils.py: "(A)", then " A ", then an option's text; the last one said.

    Where nothing is found the official code draws a letter; without `guess` the letter is "" (wrong).
    """
    for mark in ",.!?;:'":
        response = response.strip(mark)
    response = f" {response} "
    places = {letter: response.rfind(f"({letter})") for letter in choices if f"({letter})" in response}
    if not places:
        places = {letter: response.rfind(f" {letter} ") for letter in choices if f" {letter} " in response}
    if not places and len(response.split()) > 5:
        low = response.lower()
        places = {letter: low.rfind(text.lower()) for letter, text in texts.items() if text.lower() in low}
    if places:
        return Choice(max(places, key=places.__getitem__))
    return Choice(guess.choice(choices) if guess is not None else "", is_guess=True)
