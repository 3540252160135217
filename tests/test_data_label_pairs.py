"""Which tokens of two sides go together, against plain rules on tokens laid by hand.

The first three places of a side are a prompt.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from llava_kd.batch import IGNORE_INDEX
from llava_kd.data.sources.conversation import Record
from llava_kd.data.text.alignment import matched
from llava_kd.data.text.encoder import Encoded
from llava_kd.data.text.stretches import Speller, stretched

RECORD = Record(id="r", images=(), turns=())


def refused(message: str) -> AbstractContextManager[object]:
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


# Two sides with the same tokenizer ----


def side_of(*targets: tuple[int, int, int, int, int], prompt: int = 3, truncated: bool = False) -> Encoded:
    """A prompt of zeros, and targets: the id, and the span."""
    ids = torch.tensor([0] * prompt + [i for i, *_ in targets])
    spans = torch.tensor([[0] * 4] * prompt + [list(span) for _, *span in targets], dtype=torch.int32)
    labels = torch.where(torch.arange(len(ids)) >= prompt, ids, IGNORE_INDEX)
    visual = torch.zeros(len(ids), dtype=torch.bool)
    return Encoded(ids=ids, labels=labels, visual=visual, spans=spans, is_truncated=truncated)


def pairs(student: Encoded, teacher: Encoded) -> list[tuple[int, int]]:
    """The labels of the two, side by side."""
    ours, theirs = matched(RECORD, (student, teacher))
    return list(zip(*(e.labels[e.labels != IGNORE_INDEX].tolist() for e in (ours, theirs)), strict=True))


MISMATCH = (
    "record 'r': student and teacher must read the same answer tokens; their templates or tokenizers cut the "
    "answer differently: give both sides the same template"
)
A, B, END = (5, 0, 0, 2, 0), (6, 0, 2, 4, 0), (9, 0, 4, 4, 1)


def test_one_side_is_given_back() -> None:
    one = side_of(A, B, END)
    assert matched(RECORD, (one,)) == (one,)


def test_equal_targets_are_paired_and_the_longer_side_loses_the_rest() -> None:
    whole, cut = side_of(A, B, END), side_of(A, B, truncated=True)
    for sides in ((whole, cut), (cut, whole)):
        ours, theirs = matched(RECORD, sides)
        assert [e.labels.tolist() for e in (ours, theirs)] == [
            [IGNORE_INDEX] * 3 + [5, 6] + [IGNORE_INDEX] * (len(e.ids) - 5) for e in (ours, theirs)
        ]
        assert ours.is_truncated
        assert theirs.is_truncated
    same = matched(RECORD, (whole, side_of(A, B, END, prompt=5)))
    assert [e.is_truncated for e in same] == [False, False]
    assert same[1].labels.tolist() == [IGNORE_INDEX] * 5 + [5, 6, 9]


def test_another_end_token_is_a_pair_of_unequal_labels() -> None:
    assert pairs(side_of(A, B, END), side_of(A, B, (8, 0, 4, 4, 1))) == [(5, 5), (6, 6), (9, 8)]


def test_a_space_before_the_first_word_stands_beside_a_token_of_the_prompt() -> None:
    lead = (3, 0, 0, 0, 1)
    assert pairs(side_of(lead, A, B, END), side_of((7, 0, 0, 2, 1), B, END)) == [
        (3, 0),
        (5, 7),
        (6, 6),
        (9, 9),
    ]
    # Taken off where the teacher has more of them than the student.
    assert pairs(side_of((7, 0, 0, 2, 1), B, END), side_of(lead, A, B, END)) == [(7, 5), (6, 6), (9, 9)]


def test_two_tokens_before_the_first_word_stand_beside_two_of_the_prompt() -> None:
    leads = (3, 0, 0, 0, 1), (4, 0, 0, 0, 1)
    teacher = side_of((7, 0, 0, 2, 1), B, END, prompt=4)
    assert pairs(side_of(*leads, A, B, END), teacher) == [(3, 0), (4, 0), (5, 7), (6, 6), (9, 9)]
    for prompt in (0, 1, 2):  # the first token of a record is never a target, so two are too few
        with refused(MISMATCH):
            pairs(side_of(*leads, A, B, END), side_of((7, 0, 0, 2, 1), B, END, prompt=prompt))
    assert pairs(side_of(*leads, A, B, END), side_of((7, 0, 0, 2, 1), B, END, prompt=3))[1] == (4, 0)


def test_a_missing_token_never_stands_where_another_target_does() -> None:
    """As where one answer follows the other without a question between them."""
    lead, first = (3, 1, 0, 0, 1), (7, 1, 0, 2, 1)
    student = side_of(A, B, END, lead, (5, 1, 0, 2, 0))
    with refused(MISMATCH):
        matched(RECORD, (student, side_of(A, B, (8, 0, 4, 4, 1), first)))
    # With a token of the question between them there is room.
    apart = side_of(A, B, (8, 0, 4, 4, 1), (0, 0, 0, 0, 0), first)
    labels = apart.labels.clone()
    labels[6] = IGNORE_INDEX
    found = pairs(student, replace(apart, labels=labels))
    assert found == [(5, 5), (6, 6), (9, 8), (3, 0), (5, 7)]


def test_other_tokens_inside_an_answer_are_refused() -> None:
    student = side_of(A, B, (4, 0, 4, 6, 0), (2, 0, 6, 8, 0), (9, 0, 8, 8, 1))
    for middle in ([(1, 0, 4, 8, 0)], [(4, 0, 4, 6, 0), (1, 0, 6, 8, 0)]):
        with refused(MISMATCH):
            matched(RECORD, (student, side_of(A, B, *middle, (8, 0, 8, 8, 1))))
    # At the start of an answer a template may cut otherwise.
    assert pairs(side_of((5, 0, 0, 1, 0), (6, 0, 1, 4, 0), END), side_of((7, 0, 0, 4, 0), END)) == [
        (5, 0),
        (6, 7),
        (9, 9),
    ]


def test_a_side_that_ends_inside_a_group_ends_the_pairs() -> None:
    long, short = side_of((7, 0, 0, 4, 1), END), side_of((5, 0, 0, 2, 1), truncated=True)
    for sides in ((short, long), (long, short)):
        with refused(
            "record 'r': no token of its answers is left on both sides within max_length; raise max_length "
            "or remove the record"
        ):
            matched(RECORD, sides)
    first = (1, 0, 0, 1, 1)
    assert pairs(side_of(first, (5, 0, 1, 2, 1)), side_of((2, 0, 0, 1, 1), (7, 0, 1, 4, 1))) == [(1, 2)]
    assert pairs(side_of(first, (7, 0, 1, 4, 1)), side_of((2, 0, 0, 1, 1), (5, 0, 1, 2, 1))) == [(1, 2)]


def test_a_later_answer_is_paired_with_its_own() -> None:
    second = [(5, 1, 0, 2, 0), (9, 1, 2, 2, 1)]
    found = pairs(
        side_of(A, B, END, *second), side_of(A, B, (8, 0, 4, 4, 1), (5, 1, 0, 2, 0), (8, 1, 2, 2, 1))
    )
    assert found == [(5, 5), (6, 6), (9, 8), (5, 5), (9, 8)]


# Two sides with other tokenizers ----


def spelled_side(
    texts: list[str], cuts: list[list[int]], *, end: int, kept: int | None = None
) -> tuple[Encoded, Speller]:
    """Answers cut at these characters, each with an end token; the first `kept` targets alone."""
    names: list[bytes | None] = [None] * 100
    rows: list[tuple[int, int, int, int, int]] = []
    for answer, (text, places) in enumerate(zip(texts, cuts, strict=True)):
        bounds = [0, *places, len(text)] if text else []
        for first, stop in pairwise(bounds):
            names.append(text[first:stop].encode())
            rows.append((len(names) - 1, answer, first, stop, 0))
        rows.append((end, answer, len(text), len(text), 1))
    encoded = side_of(*rows[:kept], truncated=kept is not None)
    return encoded, Speller(names, frozenset({end, 99}))


def numbers(one: Encoded) -> list[int]:
    assert one.stretches is not None
    return one.stretches.tolist()


def test_stretches_are_the_text_between_common_cuts() -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        texts = ["".join(rng.choice(list("ab\u00e9 "), rng.integers(0, 9))) for _ in range(3)]
        cuts = [[[p for p in range(1, len(text)) if rng.random() < 0.5] for text in texts] for _ in range(2)]
        (mine, one), (theirs, other) = (spelled_side(texts, its, end=7 + k) for k, its in enumerate(cuts))
        left, right = stretched(RECORD, (mine, theirs), (one, other))
        wanted, number = ([], []), 0
        for text, *its in zip(texts, *cuts, strict=True):
            common = sorted({*its[0]} & {*its[1]} | {len(text)})
            for bounds, want in zip(its, wanted, strict=True):
                for stop in [*bounds, len(text)] if text else []:
                    want.append(number + 1 + next(k for k, c in enumerate(common) if stop <= c))
                want.append(number + len(common) * bool(text) + 1)  # its end
            number = wanted[0][-1]
        for found, want in zip((left, right), wanted, strict=True):
            assert numbers(found) == [0, 0, 0, *want]


def test_a_cut_side_has_stretches_up_to_its_cut() -> None:
    texts, cuts = ["abcd", "efgh"], [[2], [1, 3]]
    (mine, one) = spelled_side(texts, cuts, end=7)
    for kept in range(1, 7):
        theirs, other = spelled_side(texts, cuts, end=8, kept=kept)
        left, right = stretched(RECORD, (mine, theirs), (one, other))
        assert numbers(left) == [0, 0, 0, *range(1, kept + 1), *[0] * (7 - kept)]
        assert numbers(right) == [0, 0, 0, *range(1, kept + 1)]
        assert numbers(stretched(RECORD, (theirs, mine), (other, one))[0]) == numbers(right)


def test_answers_of_other_lengths_are_refused_by_their_number() -> None:
    mine, one = spelled_side(["ab", "abc", "d"], [[], [], []], end=7)
    for texts, number, sizes in (
        (["ab", "abcd", "d"], 2, ("3", "4")),
        (["a", "abc", "d"], 1, ("2", "1")),
        (["ab", "abc"], 3, ("1", "no")),
    ):
        theirs, other = spelled_side(texts, [[] for _ in texts], end=8)
        with refused(
            f"record 'r': student and teacher must read the same answers; answer {number} has {sizes[0]} "
            f"characters for the student and {sizes[1]} for the teacher: give both sides templates that keep "
            "the text as it is"
        ):
            stretched(RECORD, (mine, theirs), (one, other))
    # What a cut side read last may be shorter; what it read before may not.
    theirs, other = spelled_side(["ab", "abcd", "d"], [[], [2], []], end=8, kept=3)
    assert numbers(stretched(RECORD, (mine, theirs), (one, other))[0]) == [
        0,
        0,
        0,
        1,
        2,
        0,
        0,
        0,
        0,
    ]
    theirs, other = spelled_side(["abc", "abc", "d"], [[], [], []], end=8, kept=4)
    with refused(
        "record 'r': student and teacher must read the same answers; answer 1 has 2 characters for the "
        "student and 3 for the teacher: give both sides templates that keep the text as it is"
    ):
        stretched(RECORD, (mine, theirs), (one, other))


def test_nothing_in_common_is_refused() -> None:
    mine, _ = spelled_side(["ab"], [[]], end=7, kept=1)
    mute = Speller([None] * 200, frozenset())
    with refused(
        "record 'r': student and teacher must spell some of its answers alike, and their tokenizers share no "
        "stretch of them; remove the record, or use another teacher"
    ):
        stretched(RECORD, (mine, mine), (mute, mute))


def test_an_end_is_an_end_only_where_it_covers_nothing_and_is_one() -> None:
    """A token of the text whose id ends answers elsewhere, and a last token that is no end."""
    (mine, one), (theirs, other) = (spelled_side(["ab"], [[1]], end=7), spelled_side(["ab"], [[1]], end=8))
    not_one = Speller(other.bytes_of, frozenset())
    assert numbers(stretched(RECORD, (mine, theirs), (one, not_one))[0]) == [0, 0, 0, 1, 2, 0]
    as_text = replace(one, ends=frozenset({7, *mine.ids.tolist()}))
    cut, _ = spelled_side(["ab"], [[1]], end=7, kept=2)
    assert numbers(stretched(RECORD, (cut, theirs), (as_text, other))[0]) == [0, 0, 0, 1, 2]


def test_what_one_side_spells_otherwise_is_in_no_stretch() -> None:
    mine, one = spelled_side(["abcd"], [[2]], end=7)
    theirs, other = spelled_side(["xbcd"], [[1, 2]], end=8)
    left, right = stretched(RECORD, (mine, theirs), (one, other))
    assert numbers(left) == [0, 0, 0, 0, 1, 2]
    assert numbers(right) == [0, 0, 0, 0, 0, 1, 2]


def test_leads_of_the_same_spelling_are_a_stretch_each() -> None:
    def with_lead(*pieces: bytes | None, end: int) -> tuple[Encoded, Speller]:
        one, speller = spelled_side(["a"], [[]], end=end)
        names = list(speller.bytes_of)
        rows = []
        for piece in pieces:
            names.append(piece)
            rows.append((len(names) - 1, 0, 0, 0, 1))
        text = [(int(i), *span) for i, span in zip(one.ids[3:], one.spans[3:].tolist(), strict=True)]
        return side_of(*rows, *text), Speller(names, speller.ends)

    def of_leads(ours: tuple[bytes | None, ...], theirs: tuple[bytes | None, ...]) -> list[int]:
        (mine, one), (other, two) = with_lead(*ours, end=7), with_lead(*theirs, end=8)
        found, _ = stretched(RECORD, (mine, other), (one, two))
        return numbers(found)[3:]

    assert of_leads((b" ", b"\n"), (b" ", b"\n")) == [1, 2, 3, 4]
    assert of_leads((b" \n",), (b" ", b"\n")) == [0, 1, 2]
    assert of_leads((b" ",), (b"\n",)) == [0, 1, 2]
    assert of_leads((b" ",), ()) == [0, 1, 2]
    assert of_leads((None,), (None,)) == [0, 1, 2]


def test_bytes_of_a_character_that_both_sides_share_are_cut_apart_where_both_cut() -> None:
    def of(*tokens: tuple[bytes, int, int]) -> tuple[Encoded, Speller]:
        names: list[bytes | None] = [None] * 5 + [text for text, *_ in tokens]
        rows = [(5 + k, 0, first, stop, 0) for k, (_, first, stop) in enumerate(tokens)]
        return side_of(*rows), Speller(names, frozenset())

    face = "\U0001f600".encode()
    singles = of(*((face[k : k + 1], 0, 1) for k in range(4)), (b"t", 1, 2))
    halves = of((face[:2], 0, 1), (face[2:], 0, 1), (b"t", 1, 2))
    whole = of((face, 0, 1), (b"t", 1, 2))
    empty = of((face, 0, 1), (b"", 0, 1), (b"t", 1, 2))
    for (mine, one), (theirs, other), want in (
        (singles, halves, [1, 1, 2, 2, 3]),
        (halves, singles, [1, 2, 3]),
        (singles, whole, [1, 1, 1, 1, 2]),
        (whole, singles, [1, 2]),
        (singles, singles, [1, 2, 3, 4, 5]),
        (empty, whole, [1, 1, 2]),
        (whole, empty, [1, 2]),
    ):
        found, _ = stretched(RECORD, (mine, theirs), (one, other))
        assert numbers(found)[3:] == want
