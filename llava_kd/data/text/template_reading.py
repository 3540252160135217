"""A directory's own chat template as one of ours, by what it renders: no line of its program is read.

It is rendered around words that nothing else contains, and the text between them gives the pieces. The result
is taken only where it renders every probe again, character by character.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from llava_kd.data.sources.conversation import IMAGE_PLACEHOLDER, Turn
from llava_kd.data.text.template import Template, special_token

OWN = "own"  # the name of a template that is read from a directory and is none of the table
_SYSTEM = "Zx system."
_FIRST = Turn("user", f"{IMAGE_PLACEHOLDER}\nZx what is it?")
_ANSWERS = (Turn("assistant", "Zx cat."), Turn("assistant", "Zx yes."))
_SECOND = Turn("user", "Zx sure?")
_THIRD = Turn("user", "Zx and now?")
_TALK = (_FIRST, _ANSWERS[0], _SECOND, _ANSWERS[1])
# Whole talks, and talks that end with a question: with an image and without.
_PROBES = (_TALK, _TALK[:3], _TALK[:1], (_SECOND,), (_SECOND, _ANSWERS[1]), (_THIRD, *_TALK[1:]))
# What a template, which is a program, fails with where it wants other messages.
FAILURES = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


@dataclass(frozen=True)
class Reading:
    """What a chat template renders of a probe; None where it renders nothing of use."""

    chat_template: str
    tokenizer: PreTrainedTokenizerFast

    @property
    def renders(self) -> bool:
        """Whether it gives a text at all, be it without the words."""
        tries = (self._rendered(_TALK[:1], None, as_parts=as_parts) for as_parts in (False, True))
        return any(text is not None for text in tries)

    def text(self, turns: Sequence[Turn], system: str | None = None) -> str | None:
        """Without the beginning-of-sequence token. Messages of parts where those of strings lose words."""
        for as_parts in (False, True):
            text = self._rendered(turns, system, as_parts=as_parts)
            if text is not None and _holds(text, turns):
                return text.removeprefix(self.bos)
        return None

    @property
    def bos(self) -> str:
        return special_token(self.tokenizer, "bos_token") or ""

    @property
    def writes_bos(self) -> bool:
        for as_parts in (False, True):
            text = self._rendered(_TALK[:1], None, as_parts=as_parts)
            if text is not None and _holds(text, _TALK[:1]):
                return bool(self.bos) and text.startswith(self.bos)
        return False

    def _rendered(self, turns: Sequence[Turn], system: str | None, *, as_parts: bool) -> str | None:
        messages = [] if system is None else [{"role": "system", "content": _content(system, as_parts)}]
        messages += [{"role": turn.role, "content": _content(turn.text, as_parts)} for turn in turns]
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=turns[-1].role == "user",
            )
        except FAILURES:
            return None
        return text if isinstance(text, str) else None


def gives(template: Template, reading: Reading, probes: Sequence[Sequence[Turn]] = _PROBES) -> bool:
    """Whether `template` renders the same text of every probe.

    What follows the last answer is no part of it: some end with a line break and some do not.
    """
    eos = special_token(reading.tokenizer, "eos_token") or ""
    for turns in probes:
        ours = "".join(segment.text for segment in template.render(turns, eos_token=eos))
        theirs = reading.text(turns)
        if theirs is None or ours.removeprefix(reading.bos).rstrip("\n") != theirs.rstrip("\n"):
            return False
        if turns[-1].role == "user" and ours.removeprefix(reading.bos) != theirs:
            return False
    return True


def asks_alike(template: Template, reading: Reading) -> bool:
    """Whether one question, with an image or without, is the same text."""
    return gives(template, reading, (_TALK[:1], (_SECOND,)))


def before_question(reading: Reading) -> str | None:
    """What stands before the words of a first question; None where it cannot be seen."""
    text = reading.text((_SECOND,))
    return None if text is None else text[: text.index(_SECOND.text)]


def asked(template: Template, *, question: str = "...") -> str:
    """The text of one question, to be shown."""
    turn = Turn("user", f"{IMAGE_PLACEHOLDER}\n{question}")
    return "".join(segment.text for segment in template.render((turn,), eos_token=""))


def derived(reading: Reading) -> Template | None:
    """The template that renders what this one does; None where ours have no pieces for it."""
    whole, question, bare = reading.text(_TALK), reading.text(_TALK[:1]), reading.text((_SECOND,))
    if whole is None or question is None or bare is None or "strftime_now" in reading.chat_template:
        return None  # one that writes today's date is another template tomorrow
    words = _FIRST.text.rpartition("\n")[2]
    before, _, rest = whole.partition(words)
    between, _, rest = rest.partition(_ANSWERS[0].text)
    change, _, rest = rest.partition(_SECOND.text)
    closing = rest.partition(_ANSWERS[1].text)[2]
    before_answer = question.partition(words)[2]
    end = _end_token(closing, reading.tokenizer)
    if end is None or not between.startswith(before_answer) or not before_answer:
        return None
    start = bare.partition(_SECOND.text)[0]
    before_user = change.removeprefix(closing if change.startswith(closing) else closing.rstrip("\n"))
    while before_user and not start.endswith(before_user):  # a line break that closes an answer, not opens
        if not before_user[0].isspace():
            return None
        before_user = before_user[1:]
    if not before_user or not before.startswith(start) or IMAGE_PLACEHOLDER not in before[len(start) :]:
        return None
    before_image, _, after_image = before[len(start) :].partition(IMAGE_PLACEHOLDER)
    block = start.removesuffix(before_user)
    before_system, system, after_system = _system(reading, block, before_user)
    is_eos = end == special_token(reading.tokenizer, "eos_token")
    template = Template(
        name=OWN,
        system=system,
        before_system=before_system,
        after_system=after_system,
        system_opens_user=before_system.endswith(before_user) and not block,
        before_user=before_user,
        before_answer=before_answer,
        answer_lead=between.removeprefix(before_answer),
        end_token=None if is_eos else end,
        after_answer=change.removesuffix(before_user).removeprefix(end),
        starts_with_bos=reading.writes_bos and not Template(name=OWN).bos_text(reading.tokenizer),
        before_image=before_image,
        after_image=after_image.removesuffix("\n"),
    )
    return template if gives(template, reading) else None


def _system(reading: Reading, block: str, before_user: str) -> tuple[str, str, str]:
    """What is before, in and after the default system turn, `block`, which no message replaces in some."""
    given = reading.text((_SECOND,), system=_SYSTEM)
    opening = given.partition(_SECOND.text)[0] if given is not None else ""
    lead, found, close = opening.partition(_SYSTEM)
    if lead.endswith(before_user) and not block:  # it stands in the first user turn
        return lead, "", close
    close = close.removesuffix(before_user)
    if not found:
        return "", block, ""
    if not block:
        return lead, "", close
    if block.startswith(lead) and block.endswith(close) and len(block) > len(lead) + len(close):
        return lead, block[len(lead) : len(block) - len(close)], close
    return "", block, ""


def _end_token(closing: str, tokenizer: PreTrainedTokenizerFast) -> str | None:
    """The longest token, of those that are never split, that `closing` begins with."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values())
    return max((token for token in added if token and closing.startswith(token)), key=len, default=None)


def _content(text: str, as_parts: bool) -> str | list[dict[str, str]]:
    if not as_parts:
        return text
    images = [{"type": "image"}] * text.count(IMAGE_PLACEHOLDER)
    return [*images, {"type": "text", "text": text.replace(IMAGE_PLACEHOLDER, "").strip()}]


def _holds(text: str, turns: Sequence[Turn]) -> bool:
    """Whether the words and pictures of all turns stand in the text, in their order, each once."""
    place = 0
    for turn in turns:
        words = turn.text.rpartition("\n")[2]
        found = text.find(words, place)
        if found < 0 or text.count(words) != 1:
            return False
        place = found + len(words)
    return text.count(IMAGE_PLACEHOLDER) == sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns)
