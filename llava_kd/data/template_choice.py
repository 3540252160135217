"""Which template a model speaks: the one its directory has, or that of its language model's family."""

from __future__ import annotations

from collections.abc import Mapping

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from llava_kd.data.conversation import IMAGE_PLACEHOLDER, Turn
from llava_kd.data.template import Template
from llava_kd.data.template_table import TEMPLATES

AUTO = "auto"
# By the tokens that only this family's turns are made of; the first that a tokenizer has all of.
MARKS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("gemma", ("<start_of_turn>", "<end_of_turn>")),
    ("llama3", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    ("phi4", ("<|im_start|>", "<|im_sep|>", "<|im_end|>")),
    ("chatml", ("<|im_start|>", "<|im_end|>")),
    ("phi3", ("<|user|>", "<|assistant|>", "<|end|>")),
)
# Families whose turns are made of plain words, by the start of their model type. Others get `vicuna`.
WORDS = (("olmo", "tulu"),)
_TALK = (
    Turn("user", f"{IMAGE_PLACEHOLDER}\nWhat is it?"),
    Turn("assistant", "A cat."),
    Turn("user", "Sure?"),
    Turn("assistant", "Yes."),
)


def choose(
    name: str,
    *,
    tokenizer: PreTrainedTokenizerFast,
    model_type: str,
    chat_template: str | Mapping[str, str] | None,
    where: str = "data.template",
) -> Template:
    """The template of that name; `auto` is the model's own where it is one of ours, else its family's.

    A model's own that forgets the question (`plain`) was left by a first stage and is not taken. Of several
    that a model has, its own is the one named `default`.
    """
    if name != AUTO:
        if name not in TEMPLATES:
            raise ValueError(f"`{where}` must be {AUTO} or one of {', '.join(TEMPLATES)}; got {name!r}")
        return TEMPLATES[name]
    if isinstance(chat_template, Mapping):
        chat_template = chat_template.get("default")
    own = None if chat_template is None else recognised(chat_template, tokenizer)
    return own or family_template(tokenizer, model_type)


def family_template(tokenizer: PreTrainedTokenizerFast, model_type: str) -> Template:
    """By the tokens that a tokenizer has for turns, then by the type of its language model."""
    vocabulary = tokenizer.get_vocab()
    for name, tokens in MARKS:
        if all(token in vocabulary for token in tokens):
            return TEMPLATES[name]
    for start, name in WORDS:
        if model_type.startswith(start):
            return TEMPLATES[name]
    return TEMPLATES["vicuna"]


def recognised(chat_template: str, tokenizer: PreTrainedTokenizerFast) -> Template | None:
    """The one of ours, but for `plain`, that gives the text of a stock chat template; None without one."""
    messages = [{"role": turn.role, "content": turn.text} for turn in _TALK]
    try:
        whole = tokenizer.apply_chat_template(messages, chat_template=chat_template, tokenize=False)
        asked = tokenizer.apply_chat_template(
            messages[:-1], chat_template=chat_template, tokenize=False, add_generation_prompt=True
        )
    except (TemplateError, TypeError):  # it wants other messages than a string each
        return None
    eos = tokenizer.special_tokens_map.get("eos_token", "")
    for template in TEMPLATES.values():
        ours = [
            template.bos_text(tokenizer) + "".join(s.text for s in template.render(turns, eos_token=eos))
            for turns in (_TALK, _TALK[:-1])
        ]
        # What follows the last answer is no part of it: some end with a line break and some do not.
        if not template.images_only and (str(whole).rstrip("\n"), asked) == (ours[0].rstrip("\n"), ours[1]):
            return template
    return None
