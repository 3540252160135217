"""Label masks, truncation, and the stock chat template, for every template and kind of tokenizer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from data_samples import IMAGE_TOKEN, llama_like, qwen_like
from transformers import PreTrainedTokenizerFast

from llava_kd.batch import IGNORE_INDEX
from llava_kd.data.sources.llava_json import Record, Turn, parse_record
from llava_kd.data.text.encoder import Encoder
from llava_kd.data.text.template import Template
from llava_kd.data.text.template_table import TEMPLATES

TOKENIZERS = {"qwen": qwen_like(), "llama": llama_like()}
TURNS = {
    "one image": [("user", f"{IMAGE_TOKEN}\nWhat colour?"), ("assistant", "Red.")],
    "image without words": [("user", IMAGE_TOKEN), ("assistant", "A large circle.")],
    "two images": [
        ("user", f"{IMAGE_TOKEN}\n{IMAGE_TOKEN}\nWhich one is red?"),
        ("assistant", "the 2nd: caf\u00e9 \U0001f600"),
    ],
    "images between words": [
        ("user", f"First {IMAGE_TOKEN} then {IMAGE_TOKEN}?"),
        ("assistant", "(A)"),
    ],
    "three rounds": [
        ("user", f"{IMAGE_TOKEN}\nHow many?"),
        ("assistant", "12"),
        ("user", "And  squares?\n"),
        ("assistant", "3\n\nnot 4"),
        ("user", "yes?"),
        ("assistant", "no"),
    ],
    "text only": [("user", "Hello"), ("assistant", "Hi.")],
    "system": [("system", "Be brief."), ("user", f"{IMAGE_TOKEN}\nWhat?"), ("assistant", "A cat.")],
}


def record_of(name: str) -> Record:
    turns = tuple(Turn(role, text) for role, text in TURNS[name])
    count = sum(turn.text.count(IMAGE_TOKEN) for turn in turns)
    return Record(id=name, images=tuple(f"{k}.png" for k in range(count)), turns=turns)


def encoder_of(template: Template, tokenizer: PreTrainedTokenizerFast, **settings: int) -> Encoder:
    sizes = {"tokens_per_image": 3, "max_length": 500} | settings
    image_token_id = tokenizer.get_vocab()[IMAGE_TOKEN]
    return Encoder(template=template, tokenizer=tokenizer, image_token_id=image_token_id, **sizes)


def messages_of(record: Record, *, as_parts: bool) -> list[dict]:
    """Messages as a stock user writes them."""
    messages = []
    for turn in record.turns:
        content: object = turn.text
        if as_parts:
            images = turn.text.count(IMAGE_TOKEN)
            words = turn.text.replace(f"{IMAGE_TOKEN}\n", "").replace(IMAGE_TOKEN, "")
            content = [{"type": "image"}] * images + ([{"type": "text", "text": words}] if words else [])
        messages.append({"role": turn.role, "content": content})
    return messages


# Those that both tokenizers can close an answer of; test_data_template_choice.py has the others.
CLOSED = [t for t in TEMPLATES.values() if t.end_token in (None, "<|im_end|>")]
MARKED = {"before_image": "<im_start>", "after_image": "<im_end>"}  # as LLaVA's mm_use_im_start_end has it
CLOSED.append(replace(TEMPLATES["llava_v1"], name="marked", **MARKED))
every_template = pytest.mark.parametrize("template", CLOSED, ids=lambda template: template.name)
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())
every_record = pytest.mark.parametrize("name", TURNS)


@every_template
@every_tokenizer
@every_record
def test_labels_are_the_answers_and_their_end_tokens(
    template: Template, tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    record = record_of(name)
    encoded = encoder_of(template, tokenizer)(record)
    end = tokenizer.eos_token if template.end_token is None else template.end_token
    is_target = encoded.labels != IGNORE_INDEX
    assert torch.equal(encoded.labels[is_target], encoded.ids[is_target])
    runs = []
    for i, target in enumerate(is_target.tolist()):
        if target and (i == 0 or not is_target[i - 1]):
            runs.append([])
        if target:
            runs[-1].append(int(encoded.ids[i]))
    answers = [turn.text for turn in record.turns if turn.role == "assistant"]
    if template.name == "plain" and not record.images:
        assert tokenizer.decode(runs[0]) == tokenizer.decode(encoded.ids[1:])
    elif template.name == "plain" and len(answers) > 1:
        assert tokenizer.decode(runs[0]) == "".join(f"{answer}{end}" for answer in answers)
    else:
        assert [tokenizer.decode(run) for run in runs] == [
            f"{template.answer_lead}{answer}{end}" for answer in answers
        ]
    assert not bool((encoded.visual & is_target).any())


@every_template
@every_tokenizer
@every_record
def test_each_image_fills_its_places(
    template: Template, tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    record = record_of(name)
    encoded = encoder_of(template, tokenizer, tokens_per_image=5)(record)
    assert int(encoded.visual.sum()) == 5 * len(record.images)
    image_id = tokenizer.get_vocab()[IMAGE_TOKEN]
    assert torch.equal(encoded.visual, encoded.ids == image_id)
    assert encoded.labels[0] == IGNORE_INDEX


@every_template
@every_tokenizer
@every_record
@pytest.mark.parametrize("as_parts", [False, True], ids=["string", "parts"])
def test_chat_template_gives_the_tokens_of_training(
    template: Template, tokenizer: PreTrainedTokenizerFast, name: str, as_parts: bool
) -> None:
    record = record_of(name)
    # A list of parts has a line break after each image; only a string can have words between images.
    messages = messages_of(record, as_parts=as_parts and name != "images between words")
    chat_template = template.chat_template_for(tokenizer)
    trained = encoder_of(template, tokenizer, tokens_per_image=1)(record)
    stock = tokenizer.apply_chat_template(messages, chat_template=chat_template, return_dict=False)
    assert stock == trained.ids.tolist()


@every_template
@every_tokenizer
@pytest.mark.parametrize("kind", ["image", "image_url"])
@pytest.mark.parametrize(
    "raw", ["<image>\nWhat is it?", "What is it?\n<image>", "What <image>is it?", "<image>"]
)
def test_one_image_is_rendered_where_training_has_it_wherever_a_client_puts_it(
    template: Template, tokenizer: PreTrainedTokenizerFast, kind: str, raw: str
) -> None:
    talk = [{"from": "human", "value": raw}, {"from": "gpt", "value": "A cat."}]
    turns = parse_record({"image": "a.png", "conversations": talk}, 0).turns[:1]
    trained = "".join(s.text for s in template.render(turns, eos_token=tokenizer.eos_token))
    before, after = raw.split(IMAGE_TOKEN)
    parts = [{"type": "text", "text": before}, {"type": kind}, {"type": "text", "text": after}]
    for content in (raw, [part for part in parts if part.get("text") != ""]):
        assert trained == tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=template.chat_template,
            add_generation_prompt=True,
            tokenize=False,
        )


@every_template
@every_tokenizer
@every_record
def test_generation_prompt_is_the_training_text_before_the_last_answer(
    template: Template, tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    record = record_of(name)
    trained = encoder_of(template, tokenizer, tokens_per_image=1)(record)
    prompt = tokenizer.apply_chat_template(
        messages_of(record, as_parts=False)[:-1],
        chat_template=template.chat_template_for(tokenizer),
        add_generation_prompt=True,
        return_dict=False,
    )
    assert prompt == trained.ids[: len(prompt)].tolist()
    last_answer = trained.ids[len(prompt) :].tolist()
    end = tokenizer.eos_token if template.end_token is None else template.end_token
    text = f"{template.answer_lead}{record.turns[-1].text}{end}{template.after_answer}"
    assert tokenizer.decode(last_answer) == text
    turns = template.render(record.turns[:-1], eos_token=tokenizer.eos_token)
    assert "".join(segment.text for segment in turns) == tokenizer.apply_chat_template(
        messages_of(record, as_parts=False)[:-1],
        chat_template=template.chat_template,
        add_generation_prompt=True,
        tokenize=False,
    )


def test_chat_template_takes_a_system_message() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    tokenizer = TOKENIZERS["qwen"]
    for name, expected in {
        "vicuna": "Be brief. USER: Hi ASSISTANT:",
        "llava_v1": "Be brief. USER: Hi ASSISTANT:",
        "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n",
    }.items():
        text = tokenizer.apply_chat_template(
            messages, chat_template=TEMPLATES[name].chat_template, add_generation_prompt=True, tokenize=False
        )
        assert text == expected


@every_tokenizer
def test_token_across_the_edge_of_an_answer_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    broken = replace(TEMPLATES["vicuna"], before_answer=" ASSISTANT: ", answer_lead="")
    with pytest.raises(ValueError, match=r"record 'one image': a token crosses the start or end"):
        encoder_of(broken, tokenizer)(record_of("one image"))


def test_truncation_keeps_images_and_targets_or_names_the_record() -> None:
    template, tokenizer = TEMPLATES["vicuna"], TOKENIZERS["qwen"]
    record = record_of("three rounds")
    whole = encoder_of(template, tokenizer)(record)
    assert not whole.is_truncated
    first_target = int((whole.labels != IGNORE_INDEX).nonzero()[0])
    for length in range(1, len(whole.ids)):
        encoder = encoder_of(template, tokenizer, max_length=length)
        if length <= first_target:
            with pytest.raises(ValueError, match=r"record 'three rounds': (no token|its \d+ tokens)"):
                encoder(record)
        else:
            cut = encoder(record)
            assert cut.is_truncated
            assert torch.equal(cut.ids, whole.ids[:length])
            assert torch.equal(cut.labels, whole.labels[:length])


def test_truncation_never_drops_a_later_image() -> None:
    template, tokenizer = TEMPLATES["vicuna"], TOKENIZERS["qwen"]
    asked = (Turn("user", "one"), Turn("assistant", "two"), Turn("user", IMAGE_TOKEN))
    record = Record(id="late", images=("a.png",), turns=(*asked, Turn("assistant", "three")))
    whole = encoder_of(template, tokenizer)(record)
    last_visual = int(whole.visual.nonzero()[-1])
    assert encoder_of(template, tokenizer, max_length=last_visual + 1)(record).is_truncated
    with pytest.raises(ValueError, match=r"record 'late': .*cutting an image"):
        encoder_of(template, tokenizer, max_length=last_visual)(record)


def test_placeholder_that_is_not_one_token_is_an_error() -> None:
    tokenizer = TOKENIZERS["qwen"]
    record = record_of("one image")
    with pytest.raises(ValueError, match=r"record 'one image': <image> must be one token, id 7"):
        Encoder(
            template=TEMPLATES["vicuna"],
            tokenizer=tokenizer,
            image_token_id=7,
            tokens_per_image=3,
            max_length=100,
        )(record)


def test_missing_end_token_is_an_error() -> None:
    template = replace(TEMPLATES["chatml"], end_token="<|eot|>")
    with pytest.raises(ValueError, match=r"'<\|eot\|>', which is no token"):
        encoder_of(template, TOKENIZERS["qwen"])


def test_plain_template_forgets_the_question() -> None:
    raw = {
        "id": 1,
        "image": "a.jpg",
        "conversations": [
            {"from": "human", "value": "Describe.\n<image>"},
            {"from": "gpt", "value": " A red circle. "},
        ],
    }
    tokenizer = TOKENIZERS["qwen"]
    encoded = encoder_of(TEMPLATES["plain"], tokenizer, tokens_per_image=1)(parse_record(raw, 0))
    assert tokenizer.decode(encoded.ids) == "<image>A red circle.<|endoftext|>"
