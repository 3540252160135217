"""Scores of private tokens: patterns, spans of a record, words of its pictures, and rows that carry them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from data_samples import entry, llama_like, loader_of, qwen_like, side, write_dataset
from tiny_llava import tiny_tokenizer

from llava_kd.batch import IGNORE_INDEX
from llava_kd.data.batches.collate import Item, collate
from llava_kd.data.sources.conversation import Record, parse_record
from llava_kd.data.sources.llava_json import LlavaJson
from llava_kd.data.text.encoder import Encoded, Encoder
from llava_kd.data.text.private import PATTERNS, Tagger
from llava_kd.data.text.template_table import TEMPLATES

DIGITS = Tagger(patterns=((r"\d{4}", 1.0),))
TOKENIZERS = {"tiny": tiny_tokenizer, "qwen": qwen_like, "llama": llama_like}


def talk(*answers: str, **more: object) -> Record:
    turns = [
        turn
        for answer in answers
        for turn in ({"from": "human", "value": "code 4821?"}, {"from": "gpt", "value": answer})
    ]
    return parse_record({"id": "r", "conversations": turns, **more}, 0)


def encoded(record: Record, name: str = "tiny", *, max_length: int = 512) -> tuple[Encoded, list[str]]:
    """With the text of each token."""
    tokenizer = TOKENIZERS[name]()
    encoder = Encoder(
        template=TEMPLATES["vicuna"],
        tokenizer=tokenizer,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tokens_per_image=4,
        max_length=max_length,
    )
    found = encoder(record)
    return found, [tokenizer.decode([i]) for i in found.ids.tolist()]


def private(tagger: Tagger, record: Record, name: str = "tiny") -> str:
    """What the tokens above 0 say together."""
    found, words = encoded(record, name)
    scores = tagger(record, found).scores
    assert scores is not None
    assert bool((scores[found.labels == IGNORE_INDEX] == 0).all()), "a prompt is never private"
    return "".join(w for w, score in zip(words, scores.tolist(), strict=True) if score).strip()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_pattern_marks_its_words_of_every_answer_and_no_question(name: str) -> None:
    assert private(DIGITS, talk("It is 4821.", "No, 9075!", "none"), name) == "48219075"


@pytest.mark.parametrize(
    ("spans", "marked"),
    [
        ([{"text": "Ann"}], "Ann"),
        ([{"answer": 1, "start": 0, "stop": 3}], "Bob"),
        ([{"start": 4, "stop": 6}, {"answer": 1, "start": 4, "stop": 7, "score": 0.5}], "isold"),
    ],
)
def test_spans_of_a_record_mark_their_characters(spans: list[dict], marked: str) -> None:
    record = talk("Ann is here.", "Bob old", private_spans=spans)
    assert private(Tagger(reads_spans=True), record) == marked
    assert private(DIGITS, record) == ""  # nobody asked for them


def test_words_of_a_picture_are_private_as_whole_words() -> None:
    record = talk("The plate AB 123 is a banana.", ocr_tokens=["AB", {"text": "123"}, "an", "nowhere"])
    assert private(Tagger(ocr_score=0.7), record) == "AB123"


def test_the_largest_score_of_a_tokens_characters_counts() -> None:
    record = talk("code 4821", private_spans=[{"text": "82", "score": 0.25}])
    found, _ = encoded(record)
    scores = Tagger(patterns=((r"\d{4}", 0.5), ("4", 0.125)), reads_spans=True)(record, found).scores
    assert scores is not None
    assert scores[scores > 0].tolist() == [0.5] * 4
    low = Tagger(patterns=(("4", 0.125),), reads_spans=True)(record, found).scores
    assert low is not None
    assert low[low > 0].tolist() == [0.125, 0.25, 0.25]


def test_a_token_is_private_where_any_of_its_characters_is() -> None:
    record = talk("It is large", private_spans=[{"text": "rge"}])
    _, words = encoded(record, "qwen")
    assert " large" in words
    assert private(Tagger(reads_spans=True), record, "qwen") == "large"


def test_what_was_cut_off_has_no_score() -> None:
    record = talk("It is a very long one: 4821")
    whole, _ = encoded(record)
    cut, _ = encoded(record, max_length=len(whole.ids) - 10)
    scores = DIGITS(record, cut).scores
    assert scores is not None
    assert len(scores) == len(cut.ids)
    assert not bool(scores.any())


@pytest.mark.parametrize(
    ("span", "message"),
    [
        ({"text": "Carol"}, r"\[0\]`\.text must occur in an answer; 'Carol' occurs in none"),
        ({"answer": 2, "start": 0, "stop": 1}, r"\[0\]`\.answer must be from 0 to 0; got 2"),
        ({"start": 3, "stop": 99}, r"must lie inside its answer of 12 characters; got 3 to 99"),
        ({"start": 5, "stop": 5}, "must lie inside its answer"),
        ({"start": "1", "stop": 2}, "must have whole numbers"),
        ({"text": "Ann", "score": 0}, "score must be above 0"),
        ({"text": ""}, "must be words of an answer"),
        ("Ann", "must have `text`, or"),
    ],
)
def test_a_span_outside_the_answers_names_its_record(span: object, message: str) -> None:
    record = talk("Ann is here.", private_spans=[span])
    found, _ = encoded(record)
    with pytest.raises(ValueError, match=rf"record 'r': .*{message}"):
        Tagger(reads_spans=True)(record, found)


def test_a_field_that_is_no_list_names_its_record() -> None:
    record = talk("Ann is here.", private_spans="Ann")
    with pytest.raises(ValueError, match=r"record 'r': `private_spans` must be a list; got 'Ann'"):
        Tagger(reads_spans=True)(record, encoded(record)[0])


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("email", "write to a.b+c@d-e.org.", "a.b+c@d-e.org"),
        ("phone", "call +49 (30) 123-4567 now", "+49 (30) 123-4567"),
        ("digits", "in 12 of 20240 cases", "20240"),
        ("card", "4111 1111 1111 1111", "4111 1111 1111 1111"),
        ("iban", "to DE89 3704 0044 0532 0130 00.", "DE89 3704 0044 0532 0130 00"),
        ("ip", "at 10.0.0.17:80", "10.0.0.17"),
    ],
)
def test_the_patterns_that_come_with_the_package(name: str, text: str, found: str) -> None:
    record = talk(text)
    assert private(Tagger(patterns=((PATTERNS[name], 1.0),)), record) == found


def test_packed_rows_carry_the_scores_of_each_record_in_its_place() -> None:
    items = []
    for answer in ("a 4821", "none", "9075 b"):
        record = talk(answer)
        one = DIGITS(record, encoded(record)[0])
        items.append(Item(encoded=one, images=(), num_images=0, is_valid=True))
    rows = collate([items[:2], items[2:]], pad_id=0, size=(4, 4))
    assert rows.scores_BT is not None
    said = rows.input_ids_BT[rows.scores_BT > 0]
    assert tiny_tokenizer().decode(said) == "48219075"
    plain = [Item(encoded=encoded(talk("x"))[0], images=(), num_images=0, is_valid=True)]
    assert collate([plain], pad_id=0, size=(4, 4)).scores_BT is None


def test_another_tagger_has_another_fingerprint(tmp_path: Path) -> None:
    taggers = [DIGITS, Tagger(patterns=((r"\d{4}", 0.5),)), Tagger(reads_spans=True), Tagger(ocr_score=1.0)]
    assert len({tagger.fingerprint for tagger in taggers}) == 4
    assert Tagger(patterns=((r"\d{4}", 1.0),)).fingerprint == DIGITS.fingerprint


def test_a_loader_gives_scores_steps_and_a_fingerprint_of_its_own(tmp_path: Path) -> None:
    source = LlavaJson(write_dataset(tmp_path, [entry(i, images=i % 2) for i in range(8)]), tmp_path)
    settings = {"source": source, "student": side(), "seed": 0, "global_batch_size": 4, "micro_batch_size": 2}
    settings |= {"rank": 0, "world_size": 1}
    tagger = Tagger(patterns=((r"\d", 1.0),))
    loader, plain = loader_of(**settings, tagger=tagger), loader_of(**settings)
    for step, group in enumerate(loader.batches(0, 2)):
        for batch in group:
            assert batch.step == step
            scores_N = batch.student.target_scores_N
            assert int((scores_N > 0).sum()) == 2  # a digit in each answer
    batch = next(plain.batches(1, 2))[0]
    assert batch.student.scores_BT is None
    assert not bool(batch.student.target_scores_N.any())
    assert batch.to("cpu").student.scores_BT is None
    assert loader.fingerprint != plain.fingerprint
    other = loader_of(**settings, tagger=Tagger(patterns=((r"\d", 0.5),)))
    assert other.fingerprint not in (loader.fingerprint, plain.fingerprint)


def test_lists_of_other_fields_stay_out_of_a_record() -> None:
    record = talk("x", private_spans=[{"text": "x"}], boxes=[1, 2], ocr_tokens=["y"])
    assert {k: json.loads(v) for k, v in record.extra.items()} == {
        "private_spans": [{"text": "x"}],
        "ocr_tokens": ["y"],
    }
    assert torch.equal(encoded(record)[0].ids, encoded(talk("x"))[0].ids)
