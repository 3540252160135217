"""Which tokens of two tokenizers are the same, where their numbers are not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from llava_kd.models.words.spelling import spelled


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Ids of student and teacher that stand for the same, in one order, and the ids of each that do not."""

    student: tuple[int, ...]
    teacher: tuple[int, ...]
    student_alone: tuple[int, ...]
    teacher_alone: tuple[int, ...]

    def __str__(self) -> str:
        return (
            f"{len(self.student)} tokens spell the same on both sides; {len(self.student_alone)} only the "
            f"student has, {len(self.teacher_alone)} only the teacher"
        )


def pairs_of(
    student: PreTrainedTokenizerFast,
    teacher: PreTrainedTokenizerFast,
    ends: tuple[int, int],
    *,
    student_rows: int,
    teacher_rows: int,
) -> Pairs:
    """`ends`: the tokens that end an answer on either side are one pair, whatever they are called.

    Then control tokens of one name, and then tokens of the same bytes, the first of each where some spell
    alike. ValueError for a head narrower than its tokenizer, and for tokenizers that share no word.
    """
    for side, tokenizer, rows in (("student", student, student_rows), ("teacher", teacher, teacher_rows)):
        if rows < (needed := max(tokenizer.get_vocab().values()) + 1):
            raise ValueError(
                f"the {side}'s head has {rows} rows but its tokenizer needs {needed}; resize its embeddings"
            )
    found = {ends[0]: ends[1]}
    keys = [keys_of(tokenizer, end) for tokenizer, end in zip((student, teacher), ends, strict=True)]
    for key, number in keys[0].items():
        if key in keys[1]:
            found[number] = keys[1][key]
    if not any(isinstance(key, bytes) and key in keys[1] for key in keys[0]):
        raise ValueError(
            "no token of the student's tokenizer spells what one of the teacher's does: response_cross has "
            "nothing to compare; use another teacher, or drop response_cross"
        )
    in_order = sorted(found)
    return Pairs(
        student=tuple(in_order),
        teacher=tuple(found[number] for number in in_order),
        student_alone=_others(student.get_vocab().values(), found),
        teacher_alone=_others(teacher.get_vocab().values(), found.values()),
    )


def keys_of(tokenizer: PreTrainedTokenizerFast, end: int | None = None) -> dict[bytes | str, int]:
    """Ids by what a token spells, or by its name where it spells nothing; the plainest name comes first.

    `end` is left out.

    SentencePiece has a token for each byte beside those of the letters: the letter is what its models write.
    """
    bytes_of = spelled(tokenizer)
    found: dict[bytes | str, int] = {}
    rest: dict[bytes | str, int] = {}
    for name, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if number == end:
            continue
        spelling = bytes_of[number]
        is_byte = name.startswith("<0x") and spelling is not None and len(spelling) == 1
        (rest if is_byte else found).setdefault(name if spelling is None else spelling, number)
    return {**rest, **found}


def _others(numbers: Iterable[int], paired: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(set(numbers) - set(paired)))
