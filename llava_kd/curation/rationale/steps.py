"""A stepwise answer as its steps: sentences, with what stands around them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

ANSWER = "Answer:"
_NUMBER = re.compile(r"(?:[-*\u2022]\s+|\(?\d+[.):]\s+|step\s*\d+\s*[.:)]?\s*)+", re.IGNORECASE)
_NEXT_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"\u201c])")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One sentence. `before`: what parts it from the one before; `mark`: its number, or the word that an
    answer begins with; `claim` is what it says.
    """

    claim: str
    before: str = "\n"
    mark: str = ""
    is_answer: bool = False

    def saying(self, claim: str) -> Step:
        return replace(self, claim=claim)


def steps_of(text: str, *, answer: str = ANSWER) -> list[Step]:
    """The sentences of all lines; a line that begins with `answer` is one step, whatever it holds."""
    steps = []
    for line in filter(None, map(str.strip, text.splitlines())):
        number = _NUMBER.match(line)
        mark = number[0] if number else ""
        said = line[len(mark) :]
        if said.lower().startswith(answer.lower()):
            after = said[len(answer) :]
            lead = mark + said[: len(answer)] + after[: len(after) - len(after.lstrip())]
            steps.append(Step(claim=after.strip(), mark=lead, is_answer=True))
            continue
        for k, claim in enumerate(filter(None, _NEXT_SENTENCE.split(said))):
            steps.append(Step(claim=claim, mark="" if k else mark, before=" " if k else "\n"))
    return steps


def text_of(steps: Sequence[Step]) -> str:
    """What `steps_of` takes apart, without blank lines."""
    return "".join(step.before + step.mark + step.claim for step in steps).strip()


def begun_with(steps: Sequence[Step], *, last_goes_on: bool) -> str:
    """What a model is to go on from: it ends with its line, unless that line goes on."""
    return text_of(steps) + ("" if last_goes_on or not steps else "\n")


def malformed(steps: Sequence[Step], *, answer: str = ANSWER) -> str:
    """Why these are no stepwise answer; nothing where they are."""
    if not steps:
        return "the answer is empty"
    ends = [k for k, step in enumerate(steps) if step.is_answer]
    if not ends:
        return f"no line of it begins with {answer!r}"
    if ends[0] < len(steps) - 1:
        return f"{len(steps) - 1 - ends[0]} steps follow the line that begins with {answer!r}"
    if not steps[-1].claim:
        return f"nothing follows {answer!r}"
    if len(steps) == 1:
        return "it is an answer without a step"
    return ""
