"""The vocabulary rule: by content, padding rows out, differences named."""

from __future__ import annotations

import json

import pytest
from tiny_llava import tiny_tokenizer
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from llava_kd.models.vocabulary import left_out, num_common_columns


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


ADDED = {
    "teacher": ((), ("<pad>",)),
    "student": (("<pad>",), ()),
    "several": ((), ("<pad>", "<s1>", "<s2>")),
    "both, other ones": (("<a>",), ("<b>", "<c>")),
    "one more on one side": (("<a>",), ("<a>", "<b>")),
    "moved": (("<a>",), ("<pad>", "<a>")),
}


@pytest.mark.parametrize("case", ADDED)
def test_added_tokens_at_the_end_are_left_out(case: str) -> None:
    sides = [tiny_tokenizer(), tiny_tokenizer()]
    for side, tokens in zip(sides, ADDED[case], strict=True):
        side.add_tokens(list(tokens))
    names = [{i: token for token, i in side.get_vocab().items()} for side in sides]
    same = [i for i in names[0].keys() & names[1].keys() if names[0][i] == names[1][i]]
    columns = num_common_columns(*sides, student_rows=300, teacher_rows=280)
    assert sorted(same) == list(range(columns))
    text = left_out(*sides)
    assert text is not None
    assert all(f"{token!r}" in text for token in ADDED[case][1] if case != "one more on one side")


def with_token_at(index: int, token: str) -> PreTrainedTokenizerFast:
    """A tokenizer with an added token in a row of padding, as some tools write them."""
    tokenizer = tiny_tokenizer()
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    tree["added_tokens"].append({**tree["added_tokens"][-1], "id": index, "content": token})
    tree["model"]["vocab"] |= {added["content"]: added["id"] for added in tree["added_tokens"]}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(tree)), eos_token=tokenizer.eos_token
    )


def test_an_added_token_in_a_row_of_padding_is_left_out_with_the_padding() -> None:
    teacher = with_token_at(270, "<pad>")
    assert teacher.get_vocab()["<pad>"] == 270
    assert num_common_columns(tiny_tokenizer(), teacher, student_rows=264, teacher_rows=280) == 260
    assert left_out(tiny_tokenizer(), tiny_tokenizer()) is None


def test_added_tokens_before_others_are_refused_with_a_remedy_that_fits() -> None:
    student, teacher = tiny_tokenizer(), tiny_tokenizer()
    student.add_tokens(["<a>", "<shared>"])
    teacher.add_tokens(["<b>", "<shared>"])
    with pytest.raises(ValueError, match=r"1 ids differ .*id 260: '<a>' against '<b>'.*<shared>.*one tokeni"):
        num_common_columns(student, teacher, student_rows=300, teacher_rows=300)


@pytest.mark.parametrize("role", ["eos_token", "bos_token", "unk_token"])
def test_tokens_that_end_or_begin_a_text_differ_between_families(role: str) -> None:
    student, teacher = tiny_tokenizer(), tiny_tokenizer()
    teacher.add_special_tokens({role: "</s>"})
    with pytest.raises(ValueError, match=r"id 260: None against '</s>'\. Use a teacher of the student's"):
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
