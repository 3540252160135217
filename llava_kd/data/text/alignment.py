"""The two sides of a record with their answers in step, also where their templates differ.

An answer is the same text on both sides, but what a template puts around it is not: the space before it is
part of its first word in some, and the end token differs. A token is paired with the one that covers the same
characters of the answers. Where the two of a pair are not the same token they hold a row each, and no KL.

Shape legend: T4 four numbers of each token, see `Encoded.spans`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llava_kd.batch import IGNORE_INDEX
from llava_kd.data.sources.conversation import Record
from llava_kd.data.text.encoder import Encoded


def matched(record: Record, encoded: tuple[Encoded, ...]) -> tuple[Encoded, ...]:
    """Both sides with as many targets, pair by pair; what truncation took from one is taken from the other.

    ValueError, naming the record, if the answers themselves are not the same tokens.
    """
    if len(encoded) < 2:
        return encoded
    student, teacher = encoded
    places = [_places(e) for e in encoded]
    shared = min(len(p) for p in places)
    ids = [e.ids[p[:shared]] for e, p in zip(encoded, places, strict=True)]
    if torch.equal(ids[0], ids[1]):
        keeps = [p[:shared] for p in places]
    else:
        keeps = list(_pairs(record, student, teacher))
    if not len(keeps[0]):  # a cut inside the first words of an answer
        raise ValueError(
            f"record {record.id!r}: no token of its answers is left on both sides within max_length; raise "
            "max_length or remove the record"
        )
    return _only(student, keeps[0]), _only(teacher, keeps[1])


def _places(encoded: Encoded) -> Tensor:
    return (encoded.labels != IGNORE_INDEX).nonzero().squeeze(1)


def _only(encoded: Encoded, places: Tensor) -> Encoded:
    """Targets at these places alone; fewer than before is a truncation."""
    labels = torch.full_like(encoded.labels, IGNORE_INDEX)
    labels[places] = encoded.ids[places]
    is_truncated = encoded.is_truncated or len(places) < len(_places(encoded))
    return replace(encoded, labels=labels, is_truncated=is_truncated)


def _pairs(record: Record, student: Encoded, teacher: Encoded) -> tuple[Tensor, Tensor]:
    """Places of the student's targets and of what the teacher holds beside each."""
    mine, theirs = _places(student).tolist(), _places(teacher).tolist()
    kept_s: list[int] = []
    kept_t: list[int] = []
    s = t = 0
    while s < len(mine) and t < len(theirs):
        group_s, group_t = [mine[s]], [theirs[t]]
        s, t = s + 1, t + 1
        while _end(student, group_s) != _end(teacher, group_t):  # until both have read as far
            if _end(student, group_s) < _end(teacher, group_t):
                if s == len(mine):
                    return torch.tensor(kept_s), torch.tensor(_filled(record, kept_t))
                group_s.append(mine[s])
                s += 1
            else:
                if t == len(theirs):
                    return torch.tensor(kept_s), torch.tensor(_filled(record, kept_t))
                group_t.append(theirs[t])
                t += 1
        _check(record, student, teacher, group_s, group_t)
        lacking = max(0, len(group_s) - len(group_t))
        kept_s += group_s
        kept_t += [-1] * lacking + group_t[max(0, len(group_t) - len(group_s)) :]
    return torch.tensor(kept_s), torch.tensor(_filled(record, kept_t))


def _end(encoded: Encoded, places: list[int]) -> tuple[int, int]:
    """How far these tokens read: which answer, and up to which of its characters."""
    answer, _, stop, _ = encoded.spans[places[-1]].tolist()
    return answer, stop


def _check(
    record: Record, student: Encoded, teacher: Encoded, group_s: list[int], group_t: list[int]
) -> None:
    """ValueError for other tokens than at the edges of an answer, where a template may cut them otherwise."""
    same = len(group_s) == len(group_t) and bool((student.ids[group_s] == teacher.ids[group_t]).all())
    spans_T4 = torch.cat([student.spans[group_s], teacher.spans[group_t]])
    at_edge = bool((spans_T4[:, 1] == 0).any() or spans_T4[:, 3].any())
    if not same and not at_edge:
        raise _mismatch(record)


def _filled(record: Record, places: list[int]) -> list[int]:
    """Each missing place (-1) as the one before its neighbour: a token of the prompt, never an equal one."""
    for k in reversed(range(len(places))):
        if places[k] < 0:
            if places[k + 1] < 2 or (k > 0 and places[k - 1] >= places[k + 1] - 1):
                raise _mismatch(record)
            places[k] = places[k + 1] - 1
    return places


def _mismatch(record: Record) -> ValueError:
    return ValueError(
        f"record {record.id!r}: student and teacher must read the same answer tokens; their templates or "
        "tokenizers cut the answer differently: give both sides the same template"
    )
