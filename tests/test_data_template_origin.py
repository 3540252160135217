"""The template that the files of a TinyLLaVA or LLaVA checkpoint point to."""

from __future__ import annotations

import pytest
from data_samples import llama_like, qwen_like
from other_layouts import SYSTEM, asked

from llava_kd.data.sources.conversation import Turn
from llava_kd.data.text.template import Template
from llava_kd.data.text.template_choice import Choice
from llava_kd.data.text.template_origin import original_template
from llava_kd.data.text.template_table import TEMPLATES

QWEN, LLAMA = qwen_like(), llama_like()
TALK = ["<image>\nWhat?", "A cat.", "Sure?"]
# By conversation: what ends an answer in TinyLLaVA_Factory's data/template/.
THEIRS = {
    "phi": "<|endoftext|>",
    "qwen2_base": "<|endoftext|>",
    "qwen2_instruct": "<|im_end|>",
    "llama": "</s>",
}


def original(**changes: object) -> Choice:
    settings = {
        "is_tiny": True,
        "conversation": None,
        "names": ("Qwen/Qwen2.5-3B",),
        "model_type": "qwen2",
        "tokenizer": QWEN,
        "chat_template": TEMPLATES["chatml"].chat_template,  # the tokenizer's, which TinyLLaVA does not use
    }
    return original_template(**{**settings, **changes})


def rendered(template: Template, eos: str = "<|endoftext|>") -> str:
    turns = [Turn("assistant" if k % 2 else "user", text) for k, text in enumerate(TALK)]
    return "".join(segment.text for segment in template.render(turns, eos_token=eos))


@pytest.mark.parametrize(("conversation", "end"), THEIRS.items())
@pytest.mark.parametrize("how", ["conversation", "name"])
def test_a_conversation_of_tinyllava_is_its_own_text(conversation: str, end: str, how: str) -> None:
    for tokenizer in (QWEN, LLAMA):
        choice = original(**{how: conversation}, tokenizer=tokenizer)
        assert rendered(choice.template, str(tokenizer.eos_token)) == asked(TALK, end=end)


@pytest.mark.parametrize(
    ("model_type", "name", "guess"),
    [
        ("qwen2", "Qwen/Qwen2-0.5B", "qwen2_base"),
        ("qwen2", "Qwen/Qwen2-0.5B-Instruct", "qwen2_instruct"),
        ("phi", "microsoft/phi-2", "phi"),
        ("stablelm", "stabilityai/stablelm-2-zephyr-1_6b", "phi"),
        ("llama", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "llama"),
        ("gemma", "google/gemma-2b-it", "gemma"),
    ],
)
def test_tinyllavas_prompt_is_known_by_its_language_model(model_type: str, name: str, guess: str) -> None:
    choice = original(model_type=model_type, names=(name,))
    assert choice.reason == f"TinyLLaVA's {guess} by its language model"
    assert rendered(choice.template) == asked(TALK, end="<|endoftext|>")


def test_a_first_stage_is_plain() -> None:
    assert original(conversation="pretrain").template == TEMPLATES["plain"]


def test_llava_is_v1_or_what_its_tokenizer_has() -> None:
    llava = {"is_tiny": False, "names": ("llava-v1.5-7b",), "model_type": "llama"}
    assert original(**llava, chat_template=None).template == TEMPLATES["llava_v1"]
    assert original(**llava).template == TEMPLATES["chatml"]
    own = "Zoo rules are here. " + TEMPLATES["chatml"].chat_template
    assert rendered(original(**llava, chat_template=own).template).startswith("Zoo rules are here. ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ("llava-llama-2-13b-chat",)}, "conversation of llava-llama-2-13b-chat is not LLaVA's v1"),
        ({"names": ("LLaVA-7B-v0",)}, "conversation of LLaVA-7B-v0 is not LLaVA's v1"),
        ({"model_type": "mistral"}, "conversation of a Mistral model is not LLaVA's v1"),
        ({"conversation": "vicuna_v9"}, "names the conversation 'vicuna_v9', which is none of phi"),
        ({"name": "vicuna9"}, r"--template must be one of auto, plain.*qwen2_base.*got 'vicuna9'"),
    ],
)
def test_a_prompt_that_is_not_known_is_asked_for(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        original(
            **{"is_tiny": False, "names": ("x",), "model_type": "llama", "chat_template": None} | changes
        )


def test_marks_go_around_a_picture_and_not_around_a_first_stages() -> None:
    marks = ("<im_start>", "<im_end>")
    found = original(image_marks=marks).template
    assert rendered(found) == asked(TALK, end="<|endoftext|>", around=marks)
    assert original(image_marks=marks, conversation="plain").template == TEMPLATES["plain"]


def test_the_sentence_is_llavas() -> None:
    assert TEMPLATES["llava_v1"].system + " " == SYSTEM
