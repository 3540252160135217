"""Whether two tokenizers mean the same by every id, compared by content."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase


def num_common_columns(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    *,
    student_rows: int,
    teacher_rows: int,
) -> int:
    """Columns of both heads that stand for the same token; rows beyond them are padding.

    Raises ValueError naming the first differing tokens, or a head narrower than its tokenizer.
    """
    names_s = {index: token for token, index in student.get_vocab().items()}
    names_t = {index: token for token, index in teacher.get_vocab().items()}
    differing = sorted(i for i in names_s.keys() | names_t.keys() if names_s.get(i) != names_t.get(i))
    if differing:
        shown = ", ".join(f"id {i}: {names_s.get(i)!r} against {names_t.get(i)!r}" for i in differing[:3])
        raise ValueError(
            "student and teacher tokenizers must have the same content for a KL between their logits; "
            f"{len(differing)} ids differ (student against teacher): {shown}. "
            "Use a teacher of the student's family, or drop response_kl and visual_kl"
        )
    columns = max(names_s) + 1
    for side, rows in (("student", student_rows), ("teacher", teacher_rows)):
        if rows < columns:
            raise ValueError(
                f"the {side}'s head has {rows} rows but its tokenizer needs {columns}; resize its embeddings"
            )
    return columns
