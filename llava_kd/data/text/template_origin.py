"""The template that a checkpoint of TinyLLaVA or LLaVA was trained on, which neither writes down.

Every fine-tuning conversation of TinyLLaVA_Factory (its `data/template/`) is LLaVA's `v1`: a system sentence,
then USER and ASSISTANT. They differ by the token that ends an answer alone. LLaVA's code trains on `v1` where
no other is named, and its forks on the chat template of their tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerFast

from llava_kd.data.text.template import Template, special_token
from llava_kd.data.text.template_choice import AUTO, Choice, choose
from llava_kd.data.text.template_table import TEMPLATES

# TinyLLaVA's conversations, by what ends an answer. That of its first stage is our `plain`.
ENDS: Mapping[str, str] = {
    "phi": "<|endoftext|>",
    "qwen2_base": "<|endoftext|>",
    "qwen2_instruct": "<|im_end|>",
    "llama": "</s>",
    "gemma": "<eos>",
}
FIRST_STAGE = ("pretrain", "plain")
LLAVA_V1 = ("v1", "vicuna_v1", "llava_v1")
# By the type of the language model, as its training scripts pair them; Qwen's has two.
BY_TYPE: Mapping[str, str] = {
    **{"phi": "phi", "stablelm": "phi", "llama": "llama", "gemma": "gemma", "qwen2": "qwen2_base"},
}
# Names of LLaVA models whose conversation is none of ours, as its own code tells them apart.
_OTHERS = re.compile(r"llama-2|(?:^|[-_/])v0(?:[-_.]|$)|mpt", re.IGNORECASE)


def original_template(
    name: str = AUTO,
    *,
    is_tiny: bool,
    conversation: str | None,
    names: Sequence[str],
    model_type: str,
    tokenizer: PreTrainedTokenizerFast,
    chat_template: str | Mapping[str, str] | None,
    image_marks: tuple[str, str] | None = None,
) -> Choice:
    """The template called `name`, or with `auto` the one that its files point to, and why.

    Raises ValueError for a name that is not known, and where the files point to none of ours.
    """
    if name != AUTO:
        if name not in TEMPLATES and name not in ENDS:
            known = ", ".join(dict.fromkeys((AUTO, *TEMPLATES, *ENDS)))
            raise ValueError(f"--template must be one of {known}; got {name!r}")
        choice = Choice(template=TEMPLATES.get(name) or _tiny(name, tokenizer), reason="as set")
    elif conversation is not None:
        choice = Choice(template=_named(conversation, tokenizer), reason=f"its config's {conversation}")
    elif is_tiny:
        guess = _by_model(model_type, names)
        choice = Choice(template=TEMPLATES["llava_v1"], reason=f"TinyLLaVA's {guess} by its language model")
    else:
        choice = _llava(names, model_type, tokenizer, chat_template)
    if image_marks is None or choice.template.images_only:
        return choice
    before, after = image_marks
    return replace(choice, template=replace(choice.template, before_image=before, after_image=after))


def _named(conversation: str, tokenizer: PreTrainedTokenizerFast) -> Template:
    if conversation in FIRST_STAGE:
        return TEMPLATES["plain"]
    if conversation in LLAVA_V1:
        return TEMPLATES["llava_v1"]
    if conversation in ENDS:
        return _tiny(conversation, tokenizer)
    raise ValueError(
        f"the checkpoint names the conversation {conversation!r}, which is none of {', '.join(ENDS)} or v1; "
        f"choose one of {', '.join(TEMPLATES)} with --template"
    )


def _tiny(conversation: str, tokenizer: PreTrainedTokenizerFast) -> Template:
    """LLaVA's `v1`, its end token written out where the tokenizer's own is another."""
    end = ENDS[conversation]
    same = end == special_token(tokenizer, "eos_token")
    base = TEMPLATES["llava_v1"]
    return base if same else replace(base, name=conversation, end_token=end)


def _by_model(model_type: str, names: Sequence[str]) -> str:
    guess = BY_TYPE.get(model_type, "conversation")
    if guess == "qwen2_base" and any(re.search("instruct|chat", name, re.IGNORECASE) for name in names[:1]):
        return "qwen2_instruct"
    return guess


def _llava(
    names: Sequence[str],
    model_type: str,
    tokenizer: PreTrainedTokenizerFast,
    chat_template: str | Mapping[str, str] | None,
) -> Choice:
    other = next((name for name in names if _OTHERS.search(name)), None)
    if other is not None or (chat_template is None and model_type == "mistral"):
        raise ValueError(
            f"the conversation of {other or 'a Mistral model'} is not LLaVA's v1, and no known one; choose "
            f"the one that it was trained on from {', '.join(TEMPLATES)} with --template"
        )
    if chat_template is None:
        return Choice(template=TEMPLATES["llava_v1"], reason="LLaVA's v1, because its tokenizer has none")
    return choose(
        AUTO,
        tokenizer=tokenizer,
        model_type=model_type,
        chat_template=chat_template,
        where="--template",
    )
