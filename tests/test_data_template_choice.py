"""Templates of the families against their published chat templates, and which one a model gets."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from data_samples import CORPUS, IMAGE_TOKEN, llama_like, qwen_like
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llava_kd.batch import IGNORE_INDEX
from llava_kd.data.sources.llava_json import Record, Turn
from llava_kd.data.text.encoder import Encoder
from llava_kd.data.text.template_choice import Choice, choose, family_template, recognised
from llava_kd.data.text.template_table import ANY_OTHER, MARKS, TEMPLATES, WORDS

# What the families' own tokenizers carry, put down in the shortest form that gives their text.
PUBLISHED = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "llama3": "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "gemma": "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "phi3": "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "phi4": "{% for m in messages %}<|im_start|>{{ m['role'] }}<|im_sep|>{{ m['content'] }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}",
    "tulu": "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% if not loop.last or m['role'] == 'user' %}"
    "{{ '\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
}
TOKENS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "phi3": ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    "phi4": ("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
    "tulu": (),
}
WITH_BOS = ("llama3", "gemma")
TURNS = (
    Turn("user", f"{IMAGE_TOKEN}\nWhat colour is the star?"),
    Turn("assistant", "Yellow, and small."),
    Turn("user", "How many squares?"),
    Turn("assistant", "12"),
)
RECORD = Record(id="talk", images=("a.png",), turns=TURNS)
MESSAGES = [{"role": turn.role, "content": turn.text} for turn in TURNS]


def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the family's turn tokens; Phi-3's swallow the white space behind them."""
    special = ["<|bos|>", "<|eos|>", IMAGE_TOKEN]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=560,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens([AddedToken(t, rstrip=family == "phi3") for t in TOKENS[family]])
    if family in WITH_BOS:
        start = [("<|bos|>", backend.token_to_id("<|bos|>"))]
        backend.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=start)
    bos = {"bos_token": "<|bos|>"} if family in (*WITH_BOS, "tulu") else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|eos|>", clean_up_tokenization_spaces=False, **bos
    )


QWEN = qwen_like()
TOKENIZERS = {family: tokenizer_of(family) for family in PUBLISHED}
every_family = pytest.mark.parametrize("family", PUBLISHED)


def encoder(family: str, **more: int) -> Encoder:
    tokenizer = TOKENIZERS[family]
    image = tokenizer.get_vocab()[IMAGE_TOKEN]
    sizes = {"tokens_per_image": 1, "max_length": 500, **more}
    return Encoder(template=TEMPLATES[family], tokenizer=tokenizer, image_token_id=image, **sizes)


@every_family
@pytest.mark.parametrize("number", [2, 4], ids=["one round", "two rounds"])
def test_tokens_are_those_of_the_familys_own_chat_template(family: str, number: int) -> None:
    tokenizer = TOKENIZERS[family]
    record = Record(id="talk", images=("a.png",), turns=TURNS[:number])
    published = tokenizer.apply_chat_template(
        MESSAGES[:number], chat_template=PUBLISHED[family], return_dict=False
    )
    ours = encoder(family)(record).ids.tolist()
    assert ours[: len(published)] == published
    assert str(tokenizer.decode(ours[len(published) :])).strip("\n") == ""
    prompt = tokenizer.apply_chat_template(
        MESSAGES[: number - 1],
        chat_template=PUBLISHED[family],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert ours[: len(prompt)] == prompt


@every_family
def test_targets_are_the_answers_and_their_end_token_by_token(family: str) -> None:
    tokenizer, template = TOKENIZERS[family], TEMPLATES[family]
    encoded = encoder(family)(RECORD)
    end = template.end_token_id(tokenizer)
    expected = [
        i
        for text in ("Yellow, and small.", "12")
        for i in (*tokenizer(text, add_special_tokens=False)["input_ids"], end)
    ]
    is_target = encoded.labels != IGNORE_INDEX
    assert encoded.labels[is_target].tolist() == expected
    numbers, starts, stops, beyond = encoded.spans[is_target].T.tolist()
    for text, k in (("Yellow, and small.", 0), ("12", 1)):
        covered = [
            text[a:b]
            for n, a, b, edge in zip(numbers, starts, stops, beyond, strict=True)
            if n == k and not edge
        ]
        assert "".join(covered) == text
    assert sum(beyond) == 2
    assert not bool(encoded.spans[~is_target].any())


@every_family
def test_a_familys_tokenizer_gets_its_template_and_a_stock_chat_template_is_recognised(family: str) -> None:
    tokenizer = TOKENIZERS[family]
    assert family_template(tokenizer, {"tulu": "olmo2"}.get(family, "llama")).name == family
    found = recognised(PUBLISHED[family], tokenizer)
    assert found is not None
    assert found.name == family


def test_the_table_the_families_the_tests_and_the_page_name_the_same() -> None:
    families = {*MARKS, *WORDS}
    assert families == set(PUBLISHED)
    assert {*families, ANY_OTHER} <= TEMPLATES.keys()
    assert all(template.name == name for name, template in TEMPLATES.items())
    page = (Path(__file__).parents[1] / "docs" / "towers.md").read_text()
    listed = page.split("## Templates")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^- `(\w+)`: (.*)$", listed, re.M))
    assert rows.keys() == TEMPLATES.keys()
    for name, tokens in MARKS.items():
        assert re.findall(r"`([^`]+)`", rows[name]) == list(tokens)
    assert [name for name in rows if name in MARKS] == list(MARKS)  # the first that fits is taken


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("tokenizer", [qwen_like(), llama_like()], ids=["qwen", "llama"])
def test_what_we_write_is_recognised(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    template = TEMPLATES[name]
    found = recognised(template.chat_template_for(tokenizer), tokenizer)
    assert found == (None if template.images_only else template)


def chosen(
    chat_template: str | dict[str, str] | None,
    name: str = "auto",
    *,
    tokenizer: PreTrainedTokenizerFast = QWEN,
    is_trained: bool = True,
) -> Choice:
    return choose(
        name, tokenizer=tokenizer, model_type="qwen2", chat_template=chat_template, is_trained=is_trained
    )


def test_auto_takes_the_directorys_own_then_the_family() -> None:
    assert chosen(None).template.name == "chatml"
    assert chosen(TEMPLATES["vicuna"].chat_template).template.name == "vicuna"
    several = {"default": TEMPLATES["llava_v1"].chat_template, "tool_use": "x"}
    assert chosen(several).template.name == "llava_v1"
    assert chosen({"tool_use": TEMPLATES["vicuna"].chat_template}).template.name == "chatml"
    first_stage = chosen(TEMPLATES["plain"].chat_template)  # is not gone on with
    assert first_stage.template.name == "chatml"
    assert "drops the question" in first_stage.reason
    assert chosen("{{ messages[0]['content'][0]['text'] }}").template.name == "chatml"
    assert chosen(TEMPLATES["vicuna"].chat_template, "plain").template.name == "plain"
    with pytest.raises(
        ValueError, match=r"`data.template` must be auto or one of plain, vicuna.*got 'vicuna2'"
    ):
        chosen(None, "vicuna2")


# Templates that are none of the table, as published ones are made: what they render, not what they say.
TURNS_OF = "{% for m in messages %}{% if m['role'] != 'system' %}"
ENDED = "{% endif %}{% endfor %}"
OTHERS = {
    "default system": (
        "{% if messages[0]['role'] == 'system' %}<|im_start|>system\n{{ messages[0]['content'] }}<|im_end|>\n"
        "{% else %}<|im_start|>system\nYou are of help to all.<|im_end|>\n{% endif %}"
        + TURNS_OF
        + "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        + ENDED
        + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "a preamble that no message replaces": (
        "Look well.\n\n"
        + TURNS_OF
        + "{% if m['role'] == 'user' %}Q: {{ m['content'] }}\nA:{% else %} {{ m['content'] }}"
        "{{ eos_token }}\n{% endif %}" + ENDED
    ),
    "brackets": (
        "{{ bos_token }}"
        + TURNS_OF
        + "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %}{{ m['content'] }}"
        "{{ eos_token }}{% endif %}" + ENDED
    ),
    "parts alone": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for p in m['content'] if p is mapping %}"
        "{% if p['type'] == 'image' %}<image>\n{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "marked": replace(
        TEMPLATES["llava_v1"], before_image="<im_start>", after_image="<im_end>", end_token="<|im_end|>"
    ).chat_template,
}
LONGER = (
    Turn("user", "Hello there."),
    Turn("assistant", "Hi."),
    Turn("user", f"{IMAGE_TOKEN}\nHow many?"),
    Turn("assistant", "12 of them"),
    Turn("user", "Sure?"),
)


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("tokenizer", [QWEN, llama_like()], ids=["qwen", "llama"])
def test_a_template_that_is_none_of_ours_is_kept(kind: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Against what the template itself renders of a talk that no probe has."""
    choice = chosen(OTHERS[kind], tokenizer=tokenizer)
    assert (choice.template.name, choice.reason) == ("own", "its directory's own")
    messages: list[dict] = [{"role": turn.role, "content": turn.text} for turn in LONGER]
    if kind == "parts alone":
        for message in messages:
            words = message["content"].rpartition("\n")[2]
            images = [{"type": "image"}] * message["content"].count(IMAGE_TOKEN)
            message["content"] = [*images, {"type": "text", "text": words}]
    theirs = tokenizer.apply_chat_template(
        messages, chat_template=OTHERS[kind], tokenize=False, add_generation_prompt=True
    )
    segments = choice.template.render(LONGER, eos_token=str(tokenizer.eos_token))
    assert "".join(s.text for s in segments) == str(theirs).removeprefix(tokenizer.bos_token or "")
    ends = ("<|im_end|>", str(tokenizer.eos_token))
    assert all(s.text.endswith(ends) for s in segments if s.is_target)
    again = chosen(choice.template.chat_template_for(tokenizer), tokenizer=tokenizer)
    assert again.template == choice.template  # what is written is read as itself


def test_an_own_system_turn_gives_way_to_a_message() -> None:
    template = chosen(OTHERS["default system"]).template
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    ours, theirs = (
        QWEN.apply_chat_template(messages, chat_template=text, tokenize=False, add_generation_prompt=True)
        for text in (template.chat_template_for(QWEN), OTHERS["default system"])
    )
    assert ours == theirs


# A system text in the first user turn: as Gemma 3 has it, and Mistral.
FOLDED = {
    "gemma": "{{ bos_token }}{% set first = messages[0]['content'] + '\\n\\n' "
    "if messages[0]['role'] == 'system' else '' %}"
    "{% for m in (messages[1:] if first else messages) %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ first if loop.first else '' }}"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "own": "{% set first = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' %}"
    "{% for m in (messages[1:] if first else messages) %}{% if m['role'] == 'user' %}[INST] "
    "{{ first if loop.first else '' }}{{ m['content'] }} [/INST]{% else %} {{ m['content'] }}{{ eos_token }}"
    "{% endif %}{% endfor %}",
}


@pytest.mark.parametrize("name", FOLDED)
@pytest.mark.parametrize("number", [2, 4, 5])
def test_a_system_text_opens_the_first_user_turn_where_the_models_own_template_has_it_there(
    name: str, number: int
) -> None:
    tokenizer = tokenizer_of("gemma") if name == "gemma" else llama_like()
    choice = chosen(FOLDED[name], tokenizer=tokenizer)
    assert choice.template.name == name
    turns = (Turn("system", "Be brief."), *TURNS, TURNS[2])[:number]
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    ours = "".join(s.text for s in choice.template.render(turns, eos_token=str(tokenizer.eos_token)))
    texts = [
        str(
            tokenizer.apply_chat_template(
                messages, chat_template=text, tokenize=False, add_generation_prompt=turns[-1].role == "user"
            )
        )
        for text in (FOLDED[name], choice.template.chat_template_for(tokenizer))
    ]
    bare = [text.removeprefix(tokenizer.bos_token or "").rstrip("\n") for text in texts]
    assert ours.rstrip("\n") == bare[0] == bare[1]
    again = chosen(choice.template.chat_template_for(tokenizer), tokenizer=tokenizer)
    assert again.template == choice.template


def test_a_guess_that_loses_a_system_sentence_is_refused() -> None:
    """Answers without an end, and today's date, are what our templates cannot say."""
    endless = OTHERS["default system"].replace("<|im_end|>\n" + ENDED, "\n" + ENDED)
    dated = "{{ strftime_now('%d %b %Y') }}" + OTHERS["default system"]
    for text in (endless, dated):
        with pytest.raises(
            ValueError, match=r"You are of help to all\..* and that of its family, chatml, lacks"
        ):
            chosen(text)
        assert "You are of help to all." in chosen(text, is_trained=False).reason
        assert chosen(text, "chatml").template.name == "chatml"
    with pytest.raises(ValueError, match="chat template fails on a plain question"):
        chosen("{{ raise_exception('no') }}")


def test_a_new_students_family_template_names_what_it_leaves_out() -> None:
    choice = chosen(OTHERS["default system"], is_trained=False)
    assert choice.template.name == "chatml"
    assert "without its directory's '<|im_start|>system\\nYou are of help to all." in str(choice)


def test_a_named_template_says_so_where_the_model_learned_another() -> None:
    assert chosen(OTHERS["default system"], "chatml").reason.startswith("as set, not its directory's own")
    assert "You are of help to all." in chosen(OTHERS["default system"], "chatml").reason
    assert chosen(TEMPLATES["chatml"].chat_template, "chatml").reason == "as set"
    assert chosen(None, "chatml").reason == "as set"


def test_stock_llavas_template_asks_as_vicuna_does() -> None:
    """Its answers end with a space and no token; LLaVA's training ended them with one."""
    own = (
        "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for p in m['content'] if p is mapping %}"
        "{% if p['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ p['text'] + ' ' }}{% endif %}{% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )
    choice = chosen(own, tokenizer=llama_like())
    assert choice.template.name == "vicuna"
    assert "with the prompt of its directory's own" in choice.reason


def test_a_llama_without_turn_tokens_gets_vicuna() -> None:
    tokenizer = TOKENIZERS["tulu"]
    for model_type in ("llama", "mistral", "phi"):
        assert family_template(tokenizer, model_type).name == "vicuna"


def test_truncation_cuts_spans_with_their_tokens() -> None:
    whole = encoder("chatml", tokens_per_image=5)(RECORD)
    cut = encoder("chatml", tokens_per_image=5, max_length=len(whole.ids) - 4)(RECORD)
    assert torch.equal(cut.spans, whole.spans[:-4])
    assert len(whole.spans) == len(whole.ids)
