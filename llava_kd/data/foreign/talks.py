"""A record as text by a processor's own chat template, and where its answers stand in that text.

A chat template is a program, and no line of it is read. The talk is rendered once with words in the place of
its texts that nothing else contains; what stands between them is what the template adds. A record's own
rendering must be the same with its texts put in, character by character, or the record is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast, ProcessorMixin

from llava_kd.data.sources.conversation import IMAGE_PLACEHOLDER, Record, Turn

# What a template, which is a program, fails with where it wants other messages.
_FAILURES = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # what stands for a character that has no token
_TODAY = datetime(2026, 1, 1)  # for templates that write the date: a run is the same on every day
_IMAGE = "image"

Shape = tuple[tuple[str, tuple[str, ...]], ...]  # of each turn its role, and the kinds of its parts


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """`answers`: of each, where its words begin and end in `text`."""

    text: str
    answers: tuple[tuple[int, int], ...]


class Talks:
    """Renders records for one processor. ValueError for one that takes no conversation."""

    def __init__(self, processor: ProcessorMixin) -> None:
        self._processor = processor
        self._name = type(processor).__name__
        self._writes_date = "strftime_now" in own_chat_template(processor)
        self._control = re.compile("|".join(map(re.escape, _control_words(processor))) or "(?!)")
        self._between: dict[Shape, tuple[bool, tuple[str, ...]]] = {}

    def __call__(self, record: Record) -> Rendered:
        """ValueError, naming the record, where the text would not hold its words as they are."""
        try:
            return self._rendered(record)
        except ValueError as error:
            raise ValueError(f"record {record.id!r}: {error}") from None

    def _rendered(self, record: Record) -> Rendered:
        turns = [(turn.role, _parts(turn, record.has_places(turn))) for turn in record.turns]
        texts = [part for _, parts in turns for part in parts if part is not None]
        if found := next((m for text in texts if (m := self._control.search(text))), None):
            raise ValueError(
                f"its words {found[0]!r} are a control token of the teacher's {self._name}, which would read "
                "them as this token; remove them from the record"
            )
        shape = tuple((role, tuple(_IMAGE if p is None else "text" for p in parts)) for role, parts in turns)
        as_parts, between = self._pieces(shape)
        text, answers, place = between[0], [], 0
        for role, parts in turns:
            for part in parts:
                if part is None:
                    continue
                start = len(text)
                place += 1
                text += part + between[place]
                if role == "assistant":
                    answers.append((start, start + len(part)))
        theirs = self._apply(_messages(shape, texts, as_parts=as_parts))
        if theirs != text:
            raise ValueError(
                f"the chat template of the teacher's {self._name} changes its words, so the tokens of its "
                f"answers cannot be located: it gives {_around(theirs or '', text)!r} for "
                f"{_around(text, theirs or '')!r}"
            )
        return Rendered(text=text, answers=tuple(answers))

    def _pieces(self, shape: Shape) -> tuple[bool, tuple[str, ...]]:
        """Whether messages are lists of parts, and what the template writes around and between texts."""
        if shape not in self._between:
            number = sum(kind != _IMAGE for _, kinds in shape for kind in kinds)
            words = [f"Zq{n}qZ" for n in range(number)]
            for as_parts in (True, False):
                text = self._apply(_messages(shape, words, as_parts=as_parts))
                pieces = None if text is None else _split(text, words)
                if pieces is not None:
                    self._between[shape] = as_parts, pieces
                    break
            else:
                roles = ", ".join(role for role, _ in shape)
                raise ValueError(
                    f"the chat template of the teacher's {self._name} does not write each turn once and in "
                    f"order ({roles}); fix chat_template.jinja, or take another teacher"
                )
        return self._between[shape]

    def _apply(self, messages: list[dict]) -> str | None:
        more: dict[str, Any] = {"strftime_now": _TODAY.strftime} if self._writes_date else {}
        try:
            text = self._processor.apply_chat_template(messages, tokenize=False, **more)
        except _FAILURES:
            return None
        return text if isinstance(text, str) else None


def tokenizer_of(processor: ProcessorMixin) -> PreTrainedTokenizerFast:
    """ValueError for a processor whose tokenizer does not say which characters a token covers."""
    tokenizer = getattr(processor, "tokenizer", None)
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"the teacher's {type(processor).__name__} needs a fast tokenizer, which gives the place of each "
            f"token in the text; got {type(tokenizer).__name__}"
        )
    return cast(PreTrainedTokenizerFast, tokenizer)


def own_chat_template(processor: ProcessorMixin) -> str:
    """ValueError for a processor that renders no conversation."""
    template = getattr(processor, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str):
        raise ValueError(
            f"the teacher's {type(processor).__name__} has no chat template, so it cannot read a "
            "conversation; use a teacher that was trained on conversations, or put its chat_template.jinja "
            "into its directory"
        )
    return template


def _control_words(processor: ProcessorMixin) -> list[str]:
    """Longest first: what the tokenizer or the processor takes for more than text."""
    tokenizer = tokenizer_of(processor)
    words = {
        t.content
        for t in tokenizer.added_tokens_decoder.values()
        if t.special and not _BYTE.fullmatch(t.content)
    }
    words |= {
        getattr(processor, name, None) for name in ("image_token", "video_token", "audio_token", "boi_token")
    }
    return sorted((word for word in words if isinstance(word, str) and word), key=len, reverse=True)


def _parts(turn: Turn, has_places: bool) -> tuple[str | None, ...]:
    """Texts of a turn, and None for an image; the line break that LLaVA puts after one is not theirs."""
    if not has_places:
        return (turn.text,)
    found: list[str | None] = []
    for number, piece in enumerate(turn.text.split(IMAGE_PLACEHOLDER)):
        found += [None] if number else []
        found += [words] if (words := piece.strip()) else []
    return tuple(found)


def _messages(shape: Shape, texts: Sequence[str], *, as_parts: bool) -> list[dict]:
    """Turns without an image as strings where the template wants them so."""
    remaining, messages = iter(texts), []
    for role, kinds in shape:
        if not as_parts and _IMAGE not in kinds:
            messages.append({"role": role, "content": "".join(next(remaining) for _ in kinds)})
            continue
        parts = [
            {"type": _IMAGE} if kind == _IMAGE else {"type": "text", "text": next(remaining)}
            for kind in kinds
        ]
        messages.append({"role": role, "content": parts})
    return messages


def _split(text: str, words: Sequence[str]) -> tuple[str, ...] | None:
    """What stands around the words; None where one of them is not there once, or not in order."""
    pieces = []
    for word in words:
        before, found, text = text.partition(word)
        if not found or word in text:
            return None
        pieces.append(before)
    if any(word in piece for word in words for piece in (*pieces, text)):
        return None
    return (*pieces, text)


def _around(text: str, other: str) -> str:
    """A few characters from where two texts part."""
    pairs = enumerate(zip(text, other, strict=False))
    place = next((i for i, (a, b) in pairs if a != b), min(len(text), len(other)))
    return text[max(0, place - 20) : place + 20]
