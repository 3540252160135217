"""The answers of a record in step where both sides cut them into other tokens.

A stretch is the least text at whose ends both tokenisations have a boundary. Characters tell how far a token
reads; where several tokens share a character, as the bytes of a rare one do, their bytes tell. Of the targets
these are in no stretch, and are compared nowhere:

- words that only one side's template puts around an answer, as the space before its first word, and a first
  word that has swallowed them;
- text that an unknown token stands for, or that one of the tokenizers changes or drops;
- what is beyond the end of the side that was cut at its `max_length`.

The end of an answer is a stretch of its own: the end token of each side's template, whatever it is called.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from llava_kd.batch import IGNORE_INDEX
from llava_kd.data.sources.conversation import Record
from llava_kd.data.text.encoder import Encoded

NONE = 0  # of a token that is in no stretch; they are numbered from 1
_Group = tuple[
    list[int], list[int]
]  # places of the tokens of a stretch, on the student's side and the teacher's


@dataclass(frozen=True)
class Speller:
    """Of one tokenizer: the bytes of each token by its id, None where it spells nothing, and its ends."""

    bytes_of: Sequence[bytes | None]
    ends: frozenset[int]

    def text(self, encoded: Encoded, places: Sequence[int]) -> bytes | None:
        """None where a token spells nothing."""
        parts = [self.bytes_of[int(encoded.ids[place])] for place in places]
        return None if None in parts else b"".join(part for part in parts if part is not None)

    def ends_at(self, encoded: Encoded, place: int) -> bool:
        """Whether the token there ends an answer: it is an end, and covers nothing of the answer."""
        _, first, stop, _ = encoded.spans[place].tolist()
        return first == stop and int(encoded.ids[place]) in self.ends


Spellers = tuple[Speller, Speller]


def stretched(
    record: Record, encoded: tuple[Encoded, Encoded], spellers: Spellers
) -> tuple[Encoded, Encoded]:
    """Both sides with the number of the stretch that each target is of.

    ValueError, naming the record, if the answers are not the same text, or no stretch of them is comparable.
    """
    answers = [_by_answer(one) for one in encoded]
    _refuse_other_text(record, encoded, answers)
    numbers = tuple(torch.full_like(one.ids, NONE) for one in encoded)
    count = 0
    for answer in sorted(answers[0].keys() & answers[1].keys()):
        for group in _of_answer(encoded, (answers[0][answer], answers[1][answer]), spellers):
            count += 1
            for side, places in zip(numbers, group, strict=True):
                side[places] = count
    if count == 0:
        raise ValueError(
            f"record {record.id!r}: student and teacher must spell some of its answers alike, and their "
            "tokenizers share no stretch of them; remove the record, or use another teacher"
        )
    student, teacher = (replace(one, stretches=its) for one, its in zip(encoded, numbers, strict=True))
    return student, teacher


def _by_answer(encoded: Encoded) -> dict[int, list[int]]:
    """Places of the targets of each answer, in order."""
    found: dict[int, list[int]] = {}
    for place in (encoded.labels != IGNORE_INDEX).nonzero().squeeze(1).tolist():
        found.setdefault(int(encoded.spans[place, 0]), []).append(place)
    return found


def _refuse_other_text(
    record: Record, encoded: tuple[Encoded, Encoded], answers: Sequence[dict[int, list[int]]]
) -> None:
    """By how far each answer reaches: an answer that a cut has left whole, and the number of answers."""
    cut = [one.is_truncated for one in encoded]
    sizes = [
        {k: int(one.spans[p[-1], 2]) for k, p in its.items()}
        for one, its in zip(encoded, answers, strict=True)
    ]
    last = min((max(its, default=-1) for its, is_cut in zip(sizes, cut, strict=True) if is_cut), default=None)
    for k in sorted(sizes[0].keys() | sizes[1].keys()):
        if last is not None and k >= last:
            return
        if sizes[0].get(k) != sizes[1].get(k):
            raise ValueError(
                f"record {record.id!r}: student and teacher must read the same answers; answer {k + 1} has "
                f"{sizes[0].get(k, 'no')} characters for the student and {sizes[1].get(k, 'no')} for the "
                "teacher: give both sides templates that keep the text as it is"
            )


def _of_answer(
    encoded: tuple[Encoded, Encoded], places: tuple[list[int], list[int]], spellers: Spellers
) -> Iterator[_Group]:
    """The stretches of one answer."""
    mine, theirs = (list(its) for its in places)
    sides = list(zip(spellers, encoded, (mine, theirs), strict=True))
    last: list[int] = []
    for speller, one, its in sides:
        if its and speller.ends_at(one, its[-1]):
            last.append(its.pop())
    leads = [_lead(one, its) for _, one, its in sides]
    spelling = [s.text(one, lead) for (s, one, _), lead in zip(sides, leads, strict=True)]
    if len(leads[0]) == len(leads[1]) and spelling[0] is not None and spelling[0] == spelling[1]:
        yield from ([([a], [b]) for a, b in zip(*leads, strict=True)])
    for group in _groups(encoded, mine, theirs):
        yield from _by_bytes(encoded, group, spellers)
    if len(last) == len(sides):
        yield [last[0]], [last[1]]


def _lead(encoded: Encoded, places: list[int]) -> list[int]:
    """Taken off: the first tokens that cover nothing of the answer yet."""
    lead = []
    while places and int(encoded.spans[places[0], 2]) == 0:
        lead.append(places.pop(0))
    return lead


def _groups(encoded: tuple[Encoded, Encoded], mine: list[int], theirs: list[int]) -> Iterator[_Group]:
    """Tokens up to each character that ends a token on both sides; what is left over is in none."""
    firsts, stops = (
        [one.spans[its, column].tolist() for one, its in zip(encoded, (mine, theirs), strict=True)]
        for column in (1, 2)
    )
    at, begun = [0, 0], [0, 0]
    sizes = len(mine), len(theirs)
    while at[0] < sizes[0] and at[1] < sizes[1]:
        gap = stops[0][at[0]] - stops[1][at[1]]
        shares = [
            n + 1 < size and first[n + 1] < stop[n]  # the next token is a further byte of the same character
            for n, size, first, stop in zip(at, sizes, firsts, stops, strict=True)
        ]
        if gap != 0:
            at[0 if gap < 0 else 1] += 1
        elif any(shares):
            at = [n + share for n, share in zip(at, shares, strict=True)]
        else:
            at = [at[0] + 1, at[1] + 1]
            yield mine[begun[0] : at[0]], theirs[begun[1] : at[1]]
            begun = list(at)


def _by_bytes(encoded: tuple[Encoded, Encoded], group: _Group, spellers: Spellers) -> Iterator[_Group]:
    """The group cut wherever both sides have spelled as many bytes; nothing where they spell another text."""
    texts = [s.text(one, its) for s, one, its in zip(spellers, encoded, group, strict=True)]
    if texts[0] is None or texts[0] != texts[1]:
        return
    ends: list[list[int]] = []
    for speller, one, its in zip(spellers, encoded, group, strict=True):
        lengths = torch.tensor([len(speller.text(one, [place]) or b"") for place in its])
        ends.append(lengths.cumsum(0).tolist())
    begun = [0, 0]
    for stop in sorted(set(ends[0]) & set(ends[1])):
        at = [len(its) - its[::-1].index(stop) for its in ends]
        yield group[0][begun[0] : at[0]], group[1][begun[1] : at[1]]
        begun = at
