"""The vocabulary rule: by content, padding rows out, differences named."""

from __future__ import annotations

import pytest
from tiny_llava import tiny_tokenizer

from llava_kd.models.vocabulary import num_common_columns


def test_the_common_columns_are_the_tokenizers_and_not_the_padding_rows() -> None:
    """Qwen2.5 7B has 152064 rows and 0.5B has 151936 for one tokenizer."""
    rows = len(tiny_tokenizer())
    for student_rows, teacher_rows in ((rows, rows + 20), (rows + 20, rows), (rows + 7, rows + 7)):
        columns = num_common_columns(
            tiny_tokenizer(), tiny_tokenizer(), student_rows=student_rows, teacher_rows=teacher_rows
        )
        assert columns == rows


def test_a_token_that_moved_is_named() -> None:
    with pytest.raises(ValueError, match=r"must have the same content") as caught:
        num_common_columns(
            tiny_tokenizer(),
            tiny_tokenizer(extra_tokens=("new",)),
            student_rows=300,
            teacher_rows=300,
        )
    text = str(caught.value)
    assert "5 ids differ" in text
    assert "id 256: '<|endoftext|>' against 'new'" in text
    assert "Use a teacher of the student's family, or drop response_kl and visual_kl" in text


def test_a_token_that_only_one_side_has_is_named() -> None:
    student, teacher = tiny_tokenizer(), tiny_tokenizer()
    teacher.add_tokens(["<more>"])
    with pytest.raises(ValueError, match=r"1 ids differ .*id 260: None against '<more>'"):
        num_common_columns(student, teacher, student_rows=300, teacher_rows=300)


@pytest.mark.parametrize(
    ("student_rows", "teacher_rows", "side"), [(259, 260, "student"), (260, 9, "teacher")]
)
def test_a_head_narrower_than_its_tokenizer_is_refused(
    student_rows: int, teacher_rows: int, side: str
) -> None:
    with pytest.raises(
        ValueError, match=f"the {side}'s head has .* rows but its tokenizer needs 260; resize"
    ):
        num_common_columns(
            tiny_tokenizer(), tiny_tokenizer(), student_rows=student_rows, teacher_rows=teacher_rows
        )
