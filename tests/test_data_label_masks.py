"""Which tokens of a record are targets, and what they cover, against plain rules on small cases."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from data_samples import IMAGE_TOKEN, qwen_like

from llava_kd.batch import IGNORE_INDEX
from llava_kd.data.sources.conversation import Record, Turn
from llava_kd.data.text.encoder import Encoder, _merged
from llava_kd.data.text.template import Segment
from llava_kd.data.text.template_table import TEMPLATES
from llava_kd.data.text.token_spans import target_spans

QWEN = qwen_like()
EOS = "<|endoftext|>"
TALK = (
    Turn("user", f"{IMAGE_TOKEN}\nWhich?"),
    Turn("assistant", "Red one."),
    Turn("user", "And?"),
    Turn("assistant", "Blue"),
)
RECORD = Record(id="r", images=("a.png",), turns=TALK)


def encoder_of(name: str = "chatml", **changes: Any) -> Encoder:
    told: dict[str, Any] = {
        "template": TEMPLATES[name],
        "tokenizer": QWEN,
        "image_token_id": QWEN.get_vocab()[IMAGE_TOKEN],
        "tokens_per_image": 3,
        "max_length": 500,
    }
    return Encoder(**(told | changes))


def refused(message: str) -> AbstractContextManager[object]:
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


# Spans and segments ----


def test_a_span_is_what_a_token_covers_of_its_answer() -> None:
    """Text: `ab XYZ! cd W! `, answers ` XYZ!` and ` W!`, each with a space before and a mark behind."""
    answers = [(7, 3, 6), (13, 11, 12)]
    offsets = [(0, 2), (2, 4), (4, 6), (6, 7), (7, 10), (10, 11), (11, 12), (12, 13), (13, 14)]
    is_target = [False, True, True, True, False, True, True, True, False]
    assert target_spans(answers, is_target, offsets).tolist() == [
        [0, 0, 0, 0],
        [0, 0, 1, 1],  # the space, which is not of the answer, and X
        [0, 1, 3, 0],
        [0, 3, 3, 1],  # the mark alone
        [0, 0, 0, 0],
        [1, 0, 0, 1],
        [1, 0, 1, 0],
        [1, 1, 1, 1],
        [0, 0, 0, 0],
    ]
    assert target_spans(answers, is_target, offsets).dtype == torch.int32


def test_answers_without_a_token_are_passed_over() -> None:
    assert target_spans([(2, 0, 2), (2, 2, 2), (4, 3, 4)], [True, True], [(0, 2), (2, 4)]).tolist() == [
        [0, 0, 2, 0],
        [2, 0, 1, 1],
    ]


def test_neighbouring_segments_of_a_kind_are_one_and_empty_ones_none() -> None:
    def of(*pairs: tuple[str, bool]) -> list[Segment]:
        return [Segment(text, target) for text, target in pairs]

    segments = of(("", False), ("a", False), ("", True), ("b", False), ("c", True), ("d", True), ("", False))
    assert _merged(segments) == of(("ab", False), ("cd", True))
    assert _merged(of(("", True))) == []


# One record ----


@pytest.mark.parametrize("template", ["chatml", "vicuna", "llava_v1"])
def test_ids_labels_and_spans_of_a_talk(template: str) -> None:
    """Each piece is tokenised alone: the template's edges are edges of tokens."""
    encoder, chosen = encoder_of(template), TEMPLATES[template]
    encoded = encoder(RECORD)
    end = chosen.end_token or EOS
    segments = chosen.render(TALK, eos_token=EOS)
    ids, labels, visual, spans, answer = [], [], [], [], -1
    for segment in _merged(list(segments)):
        found = QWEN(segment.text, add_special_tokens=False, return_offsets_mapping=True)
        answer += segment.is_target
        words = len(segment.text) - len(chosen.answer_lead) - len(end)
        for i, place in zip(found["input_ids"], found["offset_mapping"], strict=True):
            times = 3 if i == encoder.image_token_id else 1
            first, last = (min(max(p - len(chosen.answer_lead), 0), words) for p in place)
            beyond = place[0] < len(chosen.answer_lead) or place[1] > len(chosen.answer_lead) + words
            ids += [i] * times
            labels += [i if segment.is_target else IGNORE_INDEX] * times
            visual += [i == encoder.image_token_id] * times
            spans += [[answer, first, last, int(beyond)] if segment.is_target else [0, 0, 0, 0]] * times
    assert encoded.ids.tolist() == ids
    assert encoded.labels.tolist() == labels
    assert encoded.visual.tolist() == visual
    assert encoded.spans.tolist() == spans
    assert not encoded.is_truncated
    assert encoder.lengths([RECORD]) == [len(ids)]
    cut = replace(encoded, ids=encoded.ids[:-3])
    short = encoder_of(template, max_length=len(cut.ids))(RECORD)
    assert short.is_truncated
    for name in ("ids", "labels", "visual", "spans"):
        assert torch.equal(getattr(short, name), getattr(encoded, name)[:-3])
    exact = encoder_of(template, max_length=len(ids))(RECORD)
    assert not exact.is_truncated


def test_a_record_that_cannot_be_used_is_refused_with_the_reason() -> None:
    whole = encoder_of()(RECORD)
    first = int((whole.labels != IGNORE_INDEX).nonzero()[0])
    image = int(whole.visual.nonzero()[-1])
    assert encoder_of(max_length=first + 1)(RECORD).labels[first] == whole.ids[first]
    with refused(
        f"record 'r': no token of its answers is left within max_length {first}; raise max_length or remove "
        "the record"
    ):
        encoder_of(max_length=first)(RECORD)
    with refused(
        f"record 'r': its {len(whole.ids)} tokens do not fit into max_length {image} without cutting an "
        "image; raise max_length or remove the record"
    ):
        encoder_of(max_length=image)(RECORD)
    with refused("its picture is broken"):
        encoder_of()(replace(RECORD, fault="its picture is broken"))
    with refused(
        f"record 'r': {IMAGE_TOKEN} must be one token, id {whole.ids[image]}; its text has 1 such tokens for "
        "2 images"
    ):
        encoder_of()(replace(RECORD, images=("a.png", "b.png")))
    with refused("label masks need a fast tokenizer, which gives the place of each token in the text"):
        encoder_of(tokenizer=SimpleNamespace(is_fast=False))


def test_a_token_across_an_edge_is_refused_with_what_stands_before() -> None:
    broken = replace(TEMPLATES["vicuna"], before_answer=" ASSISTANT: ", answer_lead="")
    with refused(
        "record 'r': a token crosses the start or end of an answer, after ': Which? ASSISTANT: ': template "
        "'vicuna' gives no correct label mask with this tokenizer; choose another template"
    ):
        encoder_of(template=broken)(
            replace(RECORD, turns=(Turn("user", "Which?"), Turn("assistant", "Red")), images=())
        )


def test_an_end_that_is_no_token_of_its_own_is_refused() -> None:
    encoder = encoder_of()
    encoder._end_id = -5
    with refused("record 'r': the end of an answer was not tokenised as one token"):
        encoder(RECORD)


def test_what_a_tokenizer_throws_names_the_record() -> None:
    class Throwing:
        def __getattr__(self, name: str) -> object:
            return getattr(QWEN, name)

        def __call__(self, *_: object, **__: object) -> None:
            raise RuntimeError("no such piece")

    encoder = encoder_of()
    encoder.tokenizer = Throwing()  # pyright: ignore[reportAttributeAccessIssue]
    with refused("record 'r': its text cannot be tokenised: no such piece"):
        encoder(RECORD)


def test_lengths_count_images_faults_words_and_the_cut() -> None:
    odd = replace(RECORD, turns=(*TALK[:3], Turn("assistant", "It is <|im_end|> then.")))
    bad = replace(RECORD, fault="broken")
    private = replace(odd, turns=(*odd.turns[:3], Turn("assistant", "<|im_end|>\U00100001")))
    text = replace(RECORD, images=(), turns=(Turn("user", "Which?"), Turn("assistant", "Red")))
    several = [odd, bad, RECORD, private, text, odd]
    sizes = [len(encoder_of()(record).ids) for record in (odd, RECORD, text)]
    assert encoder_of().lengths(several) == [sizes[0], 3, sizes[1], 3, sizes[2], sizes[0]]
    assert encoder_of(max_length=10).lengths(several) == [10, 3, 10, 3, min(10, sizes[2]), 10]
    assert encoder_of().lengths([bad]) == [3]
    assert encoder_of().lengths([]) == []


def test_control_words_are_named_once_in_the_order_of_the_talk() -> None:
    turns = (
        Turn("user", f"{IMAGE_TOKEN} <|im_end|>?"),
        Turn("assistant", f"<|im_start|><|im_end|>{IMAGE_TOKEN}"),
    )
    record = replace(RECORD, turns=turns)
    assert encoder_of().control_words(record) == ["<|im_end|>", "<|im_start|>", IMAGE_TOKEN]
    assert encoder_of().control_words(RECORD) == []
