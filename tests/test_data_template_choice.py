"""Templates of the families against their published chat templates, and which one a model gets."""

from __future__ import annotations

import pytest
import torch
from data_samples import CORPUS, IMAGE_TOKEN, llama_like, qwen_like
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llava_kd.batch import IGNORE_INDEX
from llava_kd.data.encoder import Encoder
from llava_kd.data.records import Record, Turn
from llava_kd.data.template_choice import choose, family_template, recognised
from llava_kd.data.template_table import TEMPLATES

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


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("tokenizer", [qwen_like(), llama_like()], ids=["qwen", "llama"])
def test_what_we_write_is_recognised(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    template = TEMPLATES[name]
    found = recognised(template.chat_template_for(tokenizer), tokenizer)
    assert found == (None if template.images_only else template)


def test_auto_takes_the_directorys_own_then_the_family() -> None:
    tokenizer = qwen_like()

    def chosen(
        chat_template: str | dict[str, str] | None, name: str = "auto", model_type: str = "qwen2"
    ) -> str:
        return choose(name, tokenizer=tokenizer, model_type=model_type, chat_template=chat_template).name

    assert chosen(None) == "chatml"
    assert chosen(TEMPLATES["vicuna"].chat_template) == "vicuna"
    assert chosen({"default": TEMPLATES["llava_v1"].chat_template, "tool_use": "x"}) == "llava_v1"
    assert chosen({"tool_use": TEMPLATES["vicuna"].chat_template}) == "chatml"
    assert chosen(TEMPLATES["plain"].chat_template) == "chatml"  # a first stage's is not gone on with
    assert chosen("{{ messages[0]['content'][0]['text'] }}") == "chatml"
    assert chosen("{{ raise_exception('no') }}") == "chatml"
    assert chosen(TEMPLATES["vicuna"].chat_template, "plain") == "plain"
    with pytest.raises(
        ValueError, match=r"`data.template` must be auto or one of plain, vicuna.*got 'vicuna2'"
    ):
        chosen(None, "vicuna2")


def test_a_llama_without_turn_tokens_gets_vicuna() -> None:
    tokenizer = TOKENIZERS["tulu"]
    for model_type in ("llama", "mistral", "phi"):
        assert family_template(tokenizer, model_type).name == "vicuna"


def test_truncation_cuts_spans_with_their_tokens() -> None:
    whole = encoder("chatml", tokens_per_image=5)(RECORD)
    cut = encoder("chatml", tokens_per_image=5, max_length=len(whole.ids) - 4)(RECORD)
    assert torch.equal(cut.spans, whole.spans[:-4])
    assert len(whole.spans) == len(whole.ids)
