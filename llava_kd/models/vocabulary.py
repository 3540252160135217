"""Which token ids mean the same to two tokenizers, compared by content."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

_SHOWN = 3


def num_common_columns(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    *,
    student_rows: int,
    teacher_rows: int,
) -> int:
    """Leading columns of both heads that stand for the same token; rows beyond them are left out.

    Tokens that were added after a family's own, such as <pad>, may differ: they are left out as well, and
    `left_out` names them. Raises ValueError naming the first tokens of other differences, or a head narrower
    than its tokenizer.
    """
    ours, theirs = _names(student), _names(teacher)
    differing = _differing(ours, theirs)
    columns = max(ours.keys() | theirs.keys()) + 1
    if differing:
        shared, before = _alike(ours, theirs, differing)
        if not before or _families_differ(student, teacher, differing):
            raise ValueError(
                f"{_refusal(ours, theirs, differing)}. Use a teacher of the student's family, or drop "
                "response_kl and visual_kl: response_cross compares answers as text"
            )
        if len(before) < len(shared):
            raise ValueError(
                f"{_refusal(ours, theirs, differing)}. They are added tokens, which are left out where they "
                f"are the last, but both have {ours[max(shared)]!r} after them (id {max(shared)}): add what "
                "one side lacks to its tokenizer at the same id, or give both sides one tokenizer"
            )
        columns = max(before) + 1
    for side, names, rows in (("student", ours, student_rows), ("teacher", theirs, teacher_rows)):
        if rows < (needed := max(names) + 1):
            raise ValueError(
                f"the {side}'s head has {rows} rows but its tokenizer needs {needed}; resize its embeddings"
            )
    return columns


def is_other(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> bool:
    """Whether the two differ in more than added tokens behind a family's own."""
    ours, theirs = _names(student), _names(teacher)
    differing = _differing(ours, theirs)
    if not differing:
        return False
    shared, before = _alike(ours, theirs, differing)
    return len(before) < len(shared) or not before or _families_differ(student, teacher, differing)


def left_out(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> str | None:
    """The added tokens that are not compared, None where there are none."""
    ours, theirs = _names(student), _names(teacher)
    differing = _differing(ours, theirs)
    return f"{len(differing)} added: {_shown(ours, theirs, differing)}" if differing else None


def _names(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {index: token for token, index in tokenizer.get_vocab().items()}


def _differing(ours: Mapping[int, str], theirs: Mapping[int, str]) -> list[int]:
    return sorted(i for i in ours.keys() | theirs.keys() if ours.get(i) != theirs.get(i))


def _alike(
    ours: Mapping[int, str], theirs: Mapping[int, str], differing: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Ids that are the same token, and those of them before the first that is not."""
    shared = [i for i in ours.keys() & theirs.keys() if ours[i] == theirs[i]]
    return shared, [i for i in shared if i < differing[0]]


def _families_differ(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, differing: Sequence[int]
) -> bool:
    """Whether more differs than added tokens without a role: a word of the vocabulary, or how a text ends."""
    for tokenizer in (student, teacher):
        words = set(tokenizer.get_vocab().values()) - tokenizer.added_tokens_decoder.keys()
        ends = tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id
        roles = {token for token in ends if isinstance(token, int)}
        if not (words | roles).isdisjoint(differing):
            return True
    return False


def _refusal(ours: Mapping[int, str], theirs: Mapping[int, str], differing: Sequence[int]) -> str:
    return (
        "student and teacher tokenizers must have the same content for a KL between their logits; "
        f"{len(differing)} ids differ (student against teacher): {_shown(ours, theirs, differing)}"
    )


def _shown(ours: Mapping[int, str], theirs: Mapping[int, str], differing: Sequence[int]) -> str:
    more = ", ..." if len(differing) > _SHOWN else ""
    return ", ".join(f"id {i}: {ours.get(i)!r} against {theirs.get(i)!r}" for i in differing[:_SHOWN]) + more
