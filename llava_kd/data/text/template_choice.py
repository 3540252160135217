"""Which template a model speaks: the one that its directory has, or that of its language model's family."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from llava_kd.data.text.template import Template
from llava_kd.data.text.template_reading import Reading, asked, asks_alike, before_question, derived, gives
from llava_kd.data.text.template_table import ANY_OTHER, MARKS, TEMPLATES, WORDS

AUTO = "auto"
_SHOWN = 160
_WORD = re.compile(r"[^\W\d_]{2,}")
_SENTENCE = 3


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A template, and in words why it is this one."""

    template: Template
    reason: str

    def __str__(self) -> str:
        return f"{self.template.name}, {self.reason}: its prompt is {_short(asked(self.template))!r}"


def choose(
    name: str,
    *,
    tokenizer: PreTrainedTokenizerFast,
    model_type: str,
    chat_template: str | Mapping[str, str] | None,
    where: str = "data.template",
    is_trained: bool = True,
    templates: Mapping[str, Template] = TEMPLATES,
) -> Choice:
    """The template of that name among `templates`; `auto` is the model's own, else its family's.

    A model's own that forgets the question (`plain`) was left by a first stage and is not taken. Of several
    that a model has, its own is the one named `default`. `is_trained` says that it has learned its prompt
    with pictures: then one of its own that is none of the table is kept too, and ValueError is raised where
    it cannot be and has a system sentence that the family's would lose.
    """
    if isinstance(chat_template, Mapping):
        chat_template = chat_template.get("default")
    reading = None if chat_template is None else Reading(chat_template, tokenizer)
    if name != AUTO:
        if name not in templates:
            raise ValueError(f"`{where}` must be {AUTO} or one of {', '.join(templates)}; got {name!r}")
        chosen = templates[name]
        return Choice(template=chosen, reason=_as_set(chosen, reading, is_trained, templates))
    if reading is not None and (own := _own(reading, is_trained, templates)) is not None:
        return own
    family = family_template(tokenizer, model_type)
    if reading is None:
        return Choice(template=family, reason="that of its family, because its directory has none")
    if is_trained:
        _refuse_loss(reading, family, where, templates)
    start = before_question(reading)
    if start is None:
        why = "because that of its directory drops the question, as after a first stage"
        return Choice(template=family, reason=f"that of its family, {why}")
    return Choice(template=family, reason=f"that of its family, without its directory's {_short(start)!r}")


def recognised(
    chat_template: str,
    tokenizer: PreTrainedTokenizerFast,
    templates: Mapping[str, Template] = TEMPLATES,
) -> Template | None:
    """The one of the table, but for `plain`, that renders what this one does; None without one."""
    reading = Reading(chat_template, tokenizer)
    named = (template for template in templates.values() if not template.images_only)
    return next((template for template in named if gives(template, reading)), None)


def _own(reading: Reading, is_trained: bool, templates: Mapping[str, Template]) -> Choice | None:
    """The directory's own: of the table, or read from it, or one of the table that asks in the same words."""
    template = recognised(reading.chat_template, reading.tokenizer, templates)
    if template is None and is_trained:
        template = derived(reading)
    if template is not None:
        return Choice(template=template, reason="its directory's own")
    alike = next((t for t in templates.values() if not t.images_only and asks_alike(t, reading)), None)
    if alike is None:
        return None
    return Choice(template=alike, reason="with the prompt of its directory's own, and an end of answers")


def _as_set(
    template: Template, reading: Reading | None, is_trained: bool, templates: Mapping[str, Template]
) -> str:
    """Says so where the model has learned another prompt."""
    own = _own(reading, True, templates) if reading is not None and is_trained else None
    if own is None or reading is None or asks_alike(template, reading):
        return "as set"
    return f"as set, not its directory's own, whose prompt is {_short(asked(own.template))!r}"


def _refuse_loss(reading: Reading, family: Template, where: str, templates: Collection[str]) -> None:
    """ValueError where the words before a first question are a sentence that the family's has not."""
    if not reading.renders:
        raise ValueError(
            f"`{where}` is {AUTO}, but the directory's own chat template fails on a plain question; name the "
            f"template that the model was trained on, one of {', '.join(templates)}"
        )
    ours, start = set(_WORD.findall(asked(family))), before_question(reading) or ""
    if len([word for word in _WORD.findall(start) if word not in ours]) < _SENTENCE:
        return
    raise ValueError(
        f"`{where}` is {AUTO}, but a directory's own chat template puts {_short(start)!r} before a question, "
        f"which no template here renders and that of its family, {family.name}, lacks; name the template "
        f"that the model was trained on, one of {', '.join(templates)}, or change chat_template.jinja"
    )


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}"


def family_template(tokenizer: PreTrainedTokenizerFast, model_type: str) -> Template:
    """By the tokens that a tokenizer has for turns, then by the type of its language model."""
    vocabulary = tokenizer.get_vocab()
    for name, tokens in MARKS.items():
        if all(token in vocabulary for token in tokens):
            return TEMPLATES[name]
    for name, start in WORDS.items():
        if model_type.startswith(start):
            return TEMPLATES[name]
    return TEMPLATES[ANY_OTHER]
