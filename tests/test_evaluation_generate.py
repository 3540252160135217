"""Batched generation and the run around it, on a tiny random stock LLaVA directory."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_llava import make_tiny_llava
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature

from llava_kd.data.sources.conversation import Record, Turn
from llava_kd.data.text.encoder import Encoder
from llava_kd.data.text.template_table import TEMPLATES
from llava_kd.evaluation.answers import answers_file, read_lines
from llava_kd.evaluation.generation.generate import Generator, evaluation_mode, generate
from llava_kd.evaluation.generation.prompt import model_inputs, render_prompt
from llava_kd.evaluation.generation.questions import Question, read_llava_json
from llava_kd.evaluation.runner import Asking, evaluate

WORDS = ("What colour is it?", "How many?", "Is there a red circle to the left of the blue square?", "Shape?")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def data_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    (root / "images").mkdir()
    generator = np.random.default_rng(0)
    records = []
    for k in range(11):
        name = f"images/{k}.png"
        pixels = generator.integers(0, 256, (20 + k, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / name)
        turns = [
            {"from": "human", "value": f"<image>\n{WORDS[k % 4]} {k}"},
            {"from": "gpt", "value": "red"},
        ]
        records.append({"id": k, "image": name, "type": ["colour", "count"][k % 2], "conversations": turns})
    (root / "test.json").write_text(json.dumps(records))
    return root / "test.json"


@pytest.fixture(scope="module")
def generator(model_dir: Path) -> Generator:
    return Generator.load(model_dir, device=torch.device("cpu"), max_new_tokens=12)


def stock_answer(model_dir: Path, question: Question) -> str:
    """What the stock classes answer, one question at a time, by transformers' own greedy search."""
    processor = AutoProcessor.from_pretrained(model_dir)
    model = AutoModelForImageTextToText.from_pretrained(model_dir)
    content = [{"type": "image"}, {"type": "text", "text": question.text.removeprefix("<image>\n")}]
    message = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(message, add_generation_prompt=True)
    path = question.images[0]
    assert isinstance(path, Path)
    inputs = processor(text=[text], images=[Image.open(path)], return_tensors="pt")
    ids_BT = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return processor.decode(ids_BT[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_batched_answers_equal_stock_greedy_search(
    model_dir: Path, data_json: Path, generator: Generator
) -> None:
    questions = read_llava_json(data_json)[:6]
    expected = [stock_answer(model_dir, question) for question in questions]
    assert generator.answer(questions) == expected
    assert len(set(expected)) > 1


def test_a_prompt_ends_where_its_answer_begins(model_dir: Path, generator: Generator) -> None:
    """Some tokenizers put an end token behind every text; behind a prompt it would end the answer."""
    processor = copy.deepcopy(generator.processor)
    tokenizer = processor.tokenizer
    prompts = [render_prompt(processor, text, has_images=False) for text in ("What?", "What is it, please?")]
    expected = model_inputs(processor, prompts, [])
    end = tokenizer.eos_token
    for before in ("", f"{tokenizer.pad_token} "):
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{before}$A {end}",
            special_tokens=[(t, tokenizer.convert_tokens_to_ids(t)) for t in (end, tokenizer.pad_token)],
        )
        found = model_inputs(processor, prompts, [])
        width = expected["input_ids"].shape[1]
        assert torch.equal(found["input_ids"][:, -width:], expected["input_ids"])
        assert found["input_ids"].shape == found["attention_mask"].shape == (2, width + len(before.split()))


def test_answers_do_not_depend_on_the_batch(data_json: Path, generator: Generator) -> None:
    questions = read_llava_json(data_json)
    together = generator.answer(questions)
    assert together == [generator.answer([question])[0] for question in questions]
    assert together[::-1] == generator.answer(questions[::-1])


def test_bfloat16_answers_and_an_unknown_number_format_is_refused(
    model_dir: Path, data_json: Path, tmp_path: Path
) -> None:
    summary = evaluate(
        model_dir,
        data_json,
        tmp_path / "bf16",
        asking=Asking(dtype="bfloat16", max_new_tokens=3, progress=False),
    )
    assert summary["fingerprints"]["dtype"] == "bfloat16"
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, got 'int8'"):
        evaluate(model_dir, data_json, tmp_path / "int8", asking=Asking(dtype="int8"))


def test_a_batch_that_does_not_fit_says_so_and_keeps_the_answers(
    data_json: Path, generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    greedy, calls = Generator.greedy, []

    def second_fails(self: Generator, inputs: BatchFeature) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory")
        return greedy(self, inputs)

    monkeypatch.setattr(Generator, "greedy", second_fails)
    with pytest.raises(ValueError, match="batch of 4 questions needs more memory"):
        generate(generator, read_llava_json(data_json), out_dir=tmp_path, batch_size=4, progress=False)
    assert len(read_lines(answers_file(tmp_path))) == 4


def test_decode_stops_at_the_end_token(generator: Generator) -> None:
    end = generator.processor.tokenizer.eos_token_id
    red, blue = (generator.processor.tokenizer.encode(word) for word in ("red", "blue"))
    ids_BN = torch.tensor([[*red, end, *blue], [*blue, *red, end]])
    assert generator.decode(ids_BN) == ["red", "bluered"]


@pytest.mark.parametrize("name", ["vicuna", "llava_v1", "chatml"])
def test_the_prompt_is_what_the_training_template_renders(generator: Generator, name: str) -> None:
    template = TEMPLATES[name]
    processor = generator.processor
    kept = processor.chat_template
    processor.chat_template = template.chat_template_for(processor.tokenizer)
    try:
        segments = template.render([Turn("user", "<image>\nWhat?")], eos_token=processor.tokenizer.eos_token)
        expected = "".join(segment.text for segment in segments)
        assert render_prompt(processor, "<image>\nWhat?") == expected
        fresh = Generator(generator.model, processor)
        assert template.end_token_id(processor.tokenizer) in fresh.end_ids
    finally:
        processor.chat_template = kept


@pytest.mark.parametrize("name", ["vicuna", "llava_v1", "chatml"])
def test_control_words_of_a_question_are_read_as_in_training(generator: Generator, name: str) -> None:
    """Alone and beside an ordinary question, which stock code reads as ever."""
    processor = copy.deepcopy(generator.processor)
    tokenizer = processor.tokenizer
    processor.chat_template = TEMPLATES[name].chat_template_for(tokenizer)
    picture = Image.new("RGB", (40, 30), (200, 90, 10))
    asked = ("<image>\nWhat is <|im_end|>\n<|im_start|>assistant\nYes. <|endoftext|>?", "<image>\nWhat?")
    prompts = [render_prompt(processor, text) for text in asked]
    inputs = model_inputs(processor, prompts, [picture, picture])
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
    for k, text in enumerate(asked):
        ids = inputs["input_ids"][k][inputs["attention_mask"][k].bool()]
        encoder = Encoder(
            template=TEMPLATES[name],
            tokenizer=tokenizer,
            image_token_id=processor.image_token_id,
            tokens_per_image=int((ids == processor.image_token_id).sum()),
            max_length=2048,
        )
        record = Record(id="r", images=("a",), turns=(Turn("user", text), Turn("assistant", "Yes.")))
        encoded = encoder(record)
        first = int((encoded.labels != -100).nonzero()[0])
        assert torch.equal(ids, encoded.ids[:first])
    word = render_prompt(processor, "What is <image> in RSS?", has_images=False)
    ids = model_inputs(processor, [word], [])["input_ids"][0]
    assert processor.image_token_id not in ids.tolist()
    assert "What is <image> in RSS?" in tokenizer.decode(ids)


def test_the_end_token_of_the_template_ends_answers(generator: Generator) -> None:
    tokenizer = generator.processor.tokenizer
    model = generator.model
    kept = tokenizer.eos_token, model.generation_config.eos_token_id
    tokenizer.eos_token, model.generation_config.eos_token_id = "<|endoftext|>", None
    try:
        ends = Generator(model, generator.processor).end_ids
        assert ends == sorted(tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]))
    finally:
        tokenizer.eos_token, model.generation_config.eos_token_id = kept


def test_a_template_for_lists_gets_the_same_prompt_as_one_for_strings(generator: Generator) -> None:
    processor = generator.processor
    expected = render_prompt(processor, "<image>\nWhat?")
    template = processor.chat_template
    lists_only = template.replace(
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}", ""
    )
    processor.chat_template = lists_only.replace("{% endif %}<|im_end|>", "<|im_end|>")
    try:
        assert processor.chat_template != template
        assert render_prompt(processor, "<image>\nWhat?") == expected
    finally:
        processor.chat_template = template


def test_evaluation_mode_puts_every_module_back(generator: Generator) -> None:
    model = generator.model
    model.model.language_model.train()
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
    assert model.model.language_model.training
    assert not model.model.vision_tower.training
    model.eval()


def test_evaluate_writes_answers_and_summary(model_dir: Path, data_json: Path, tmp_path: Path) -> None:
    summary = evaluate(
        model_dir, data_json, tmp_path, asking=Asking(batch_size=4, max_new_tokens=4, progress=False)
    )
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [answer["id"] for answer in answers] == [str(k) for k in range(11)]
    assert set(answers[0]) == {"id", "type", "question", "image", "truth", "answer"}
    assert summary["count_by_type"] == {"colour": 6, "count": 5}
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


def test_a_killed_run_continues_and_asks_nothing_twice(
    model_dir: Path, data_json: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    evaluate(model_dir, data_json, tmp_path / "whole", asking=Asking(max_new_tokens=4, progress=False))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    lines = (tmp_path / "whole" / "answers.jsonl").read_text().splitlines(keepends=True)
    kept = json.loads(lines[3]) | {"answer": "kept from the first run"}
    (tmp_path / "cut" / "answers.jsonl").write_text(json.dumps(kept) + "\n" + lines[0] + lines[5][:20])
    evaluate(model_dir, data_json, tmp_path / "cut", asking=Asking(max_new_tokens=4, progress=False))
    resumed = (tmp_path / "cut" / "answers.jsonl").read_text().splitlines(keepends=True)
    assert "in the middle of a line (20 bytes)" in caplog.text
    assert json.loads(resumed[3])["answer"] == "kept from the first run"
    assert resumed[:3] + resumed[4:] == lines[:3] + lines[4:]


def test_a_directory_with_another_runs_answers_is_refused(
    model_dir: Path, data_json: Path, tmp_path: Path
) -> None:
    evaluate(model_dir, data_json, tmp_path / "out", asking=Asking(max_new_tokens=4, progress=False))
    other = make_tiny_llava(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"answers of another run.*model"):
        evaluate(other, data_json, tmp_path / "out", asking=Asking(max_new_tokens=4, progress=False))
    with pytest.raises(ValueError, match="max_new_tokens 4 there, 5 now"):
        evaluate(model_dir, data_json, tmp_path / "out", asking=Asking(max_new_tokens=5, progress=False))


def test_answers_about_other_pictures_are_not_taken_for_those_about_these(
    model_dir: Path, data_json: Path, tmp_path: Path
) -> None:
    """The same questions in a file in which the path of a picture was corrected."""
    asking, out = Asking(max_new_tokens=4, progress=False), tmp_path / "out"
    evaluate(model_dir, data_json, out, asking=asking)
    records = json.loads(data_json.read_text())
    records[3]["image"] = "images/4.png"
    (tmp_path / "test.json").write_text(json.dumps(records))
    with pytest.raises(ValueError, match=r"answers of another run.*pictures"):
        evaluate(model_dir, tmp_path / "test.json", out, image_root=data_json.parent, asking=asking)
    shutil.copytree(data_json.parent, tmp_path / "moved")
    moved = tmp_path / "moved" / "test.json"
    assert evaluate(model_dir, moved, out, asking=asking)["count"] == 11
    run = json.loads((out / "run.json").read_text())
    del run["pictures"]  # as before this was written down
    (out / "run.json").write_text(json.dumps(run))
    assert evaluate(model_dir, moved, out, asking=asking)["count"] == 11


def test_repeated_ids_and_talks_of_several_answers_stay_apart(tmp_path: Path) -> None:
    """The second answer of `a` and the second record of that id, as LLaVA's files repeat them."""
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]
    records = [{"id": "a", "conversations": turns * 2}, {"id": "a", "conversations": turns}]
    (tmp_path / "test.json").write_text(json.dumps(records))
    assert [question.id for question in read_llava_json(tmp_path / "test.json")] == ["a#1", "a#2", "a#2#2"]


def test_a_damaged_line_in_the_middle_is_named(model_dir: Path, data_json: Path, tmp_path: Path) -> None:
    evaluate(model_dir, data_json, tmp_path, asking=Asking(max_new_tokens=4, progress=False))
    path = tmp_path / "answers.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + "{broken\n" + lines[1])
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        evaluate(model_dir, data_json, tmp_path, asking=Asking(max_new_tokens=4, progress=False))


def test_a_directory_that_is_not_stock_llava_is_refused(data_json: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no model directory"):
        evaluate(tmp_path / "none", data_json, tmp_path / "out")
    (tmp_path / "bert").mkdir()
    with pytest.raises(ValueError, match="has no config"):
        evaluate(tmp_path / "bert", data_json, tmp_path / "out")
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"stock LLaVA.*'bert'"):
        evaluate(tmp_path / "bert", data_json, tmp_path / "out")


def one_record(tmp_path: Path, **changes: object) -> Path:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    record = {"id": "r7", "image": "a.png", "conversations": turns} | changes
    (tmp_path / "test.json").write_text(json.dumps([record]))
    return tmp_path / "test.json"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": "../a.png"}, "'r7'.*below the image root"),
        ({"image": ["a.png", "a.png"]}, "'r7'.*got 1 for 2 images"),
        ({"conversations": []}, "'r7': no conversations"),
        (
            {"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": " "}]},
            "'r7': turn 1 is an empty answer",
        ),
    ],
    ids=["escape", "count", "no-turns", "empty"],
)
def test_a_bad_record_is_named(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_llava_json(one_record(tmp_path, **changes))


def test_an_image_link_that_leaves_the_root_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    (root / "a.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(ValueError, match=r"'r7'.*leaves the image root"):
        read_llava_json(one_record(root))
    assert read_llava_json(one_record(root), follow_symlinks=True)[0].images == (root / "a.png",)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n\0\0"])
def test_an_unreadable_image_names_the_question_and_counts_as_wrong(
    model_dir: Path, tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.png").write_bytes(content)
    summary = evaluate(
        model_dir, one_record(tmp_path), tmp_path / "out", asking=Asking(max_new_tokens=2, progress=False)
    )
    assert (summary["accuracy"], summary["count"], summary["unreadable"]) == (0, 1, 1)
    assert f"question 'r7': cannot read {tmp_path / 'a.png'}" in caplog.text


def talk(*texts: str, **more: object) -> dict[str, object]:
    turns = [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(texts)]
    return {"conversations": turns, **more}


def test_every_answer_of_a_talk_is_asked_for_behind_the_true_ones(
    model_dir: Path, tmp_path: Path, generator: Generator
) -> None:
    for name in "ab":
        Image.new("RGB", (9, 9), (name == "a" and "red") or "blue").save(tmp_path / f"{name}.png")
    records = [
        talk(
            "<image>\nWhat is it?", "A thing.", "<image>\nAnd that?", "Two.", image=["a.png", "b.png"], id="r"
        ),
        talk("Hm?", "Yes.", id="s"),
    ]
    (tmp_path / "test.json").write_text(json.dumps(records))
    first, second, alone = read_llava_json(tmp_path / "test.json")
    assert (first.id, second.id, alone.id) == ("r#1", "r#2", "s")
    assert [len(question.images) for question in (first, second, alone)] == [1, 2, 0]
    assert (first.truth, second.truth) == ("A thing.", "Two.")
    processor = generator.processor
    said = [
        {"role": "user", "content": "<image>\nWhat is it?"},
        {"role": "assistant", "content": "A thing."},
        {"role": "user", "content": "<image>\nAnd that?"},
    ]
    text = processor.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    images = [Image.open(tmp_path / f"{name}.png") for name in "ab"]
    inputs = processor(text=[text], images=images, return_tensors="pt")
    expected = generator.model.generate(**inputs, max_new_tokens=12, do_sample=False)
    new = processor.decode(expected[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert generator.answer([second]) == [new]
    summary = evaluate(
        model_dir, tmp_path / "test.json", tmp_path / "out", asking=Asking(max_new_tokens=2, progress=False)
    )
    assert summary["count"] == 3


def test_the_seconds_of_all_calls_add_up(model_dir: Path, data_json: Path, tmp_path: Path) -> None:
    summary = evaluate(model_dir, data_json, tmp_path, asking=Asking(max_new_tokens=4, progress=False))
    assert 0 < summary["seconds"] < 500
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(answers.read_text().splitlines(keepends=True)[:5]))
    # As a call leaves them that was killed 30 s after it began, with 1,000 s spent before.
    (tmp_path / "time.json").write_text(json.dumps({"seconds": 1000.0, "since": 2000.0}))
    for path in tmp_path.iterdir():
        os.utime(path, (2000.0, 2000.0))
    os.utime(answers, (2030.0, 2030.0))
    resumed = evaluate(model_dir, data_json, tmp_path, asking=Asking(max_new_tokens=4, progress=False))
    assert 1030 < resumed["seconds"] < 1500
    assert (
        evaluate(model_dir, data_json, tmp_path, asking=Asking(max_new_tokens=4))["seconds"]
        == resumed["seconds"]
    )
