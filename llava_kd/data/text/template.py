"""Conversation templates: one rendering for training, label masks, evaluation and the stock chat template.

A template gives text in segments; the segments that are answers are the targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from llava_kd.data.sources.conversation import IMAGE_PLACEHOLDER, Turn


@dataclass(frozen=True)
class Segment:
    text: str
    is_target: bool


@dataclass(frozen=True, kw_only=True)
class Template:
    """How turns become text.

    `before_answer` is the generation prompt. `answer_lead` follows it and is already a target: in most
    tokenizers a word's token includes the space before it, and this space must not cross the boundary.
    `end_token` closes an answer and is a target; None is the tokenizer's own end-of-sequence token.
    With `images_only`, a user turn keeps its images and loses its words. `starts_with_bos` puts the
    beginning-of-sequence token first even if the tokenizer does not. `before_image` and `after_image`
    enclose each image. With `system_opens_user`, a system text stands in the first user turn, whose opening
    `before_system` then has.
    """

    name: str
    system: str = ""
    before_system: str = ""
    after_system: str = ""
    system_opens_user: bool = False
    before_user: str = ""
    before_answer: str = ""
    answer_lead: str = ""
    end_token: str | None = None
    after_answer: str = ""
    images_only: bool = False
    starts_with_bos: bool = False
    before_image: str = ""
    after_image: str = ""

    @property
    def image_text(self) -> str:
        """The text that replaces a placeholder."""
        return f"{self.before_image}{IMAGE_PLACEHOLDER}{self.after_image}"

    def render(self, turns: Sequence[Turn], *, eos_token: str) -> list[Segment]:
        """Segments of the turns. If the last turn is the user's, the generation prompt comes last.

        A system turn, which can only be the first, replaces the template's own system text. With
        `images_only` there is none.
        """
        system = turns[0].text if turns and turns[0].role == "system" else None
        first = self._default_system()
        if system is not None:
            first = "" if self.images_only else f"{self.before_system}{system}{self.after_system}"
        segments = [Segment(first, False)]
        is_open = self.system_opens_user and system is not None and not self.images_only
        for turn in turns[0 if system is None else 1 :]:
            if turn.role == "user":
                text = turn.text
                if self.images_only:
                    text = IMAGE_PLACEHOLDER * text.count(IMAGE_PLACEHOLDER)
                text = text.replace(IMAGE_PLACEHOLDER, self.image_text)
                before, is_open = "" if is_open else self.before_user, False
                segments.append(Segment(f"{before}{text}{self.before_answer}", False))
            else:
                end = eos_token if self.end_token is None else self.end_token
                segments.append(Segment(f"{self.answer_lead}{turn.text}{end}", True))
                segments.append(Segment(self.after_answer, False))
        return [segment for segment in segments if segment.text]

    @property
    def chat_template(self) -> str:
        """Jinja text that renders the same as `render`, for a tokenizer that adds no token of its own."""
        end = "eos_token" if self.end_token is None else _literal(self.end_token)
        image, shown = _literal(IMAGE_PLACEHOLDER), _literal(self.image_text)
        if self.images_only:
            asked = f"{{{{ {shown} * (text.split({image})|length - 1) }}}}"
        else:  # a single image first, on a line of its own, as `canonical` has it in training
            asked = (
                f"{{% set pieces = text.split({image}) %}}{{% if pieces|length == 2 %}}{{{{ {shown} }}}}"
                "{% set words = (pieces[0] + pieces[1])|trim %}{% if words %}{{ '\\n' + words }}{% endif %}"
                f"{{% else %}}{{{{ pieces|join({shown}) }}}}{{% endif %}}"
            )
        system = ""
        if not self.images_only:
            before, after = _literal(self.before_system), _literal(self.after_system)
            system = f"{{{{ {before} }}}}{{{{ plain(messages[0]['content']) }}}}{{{{ {after} }}}}"
        before_user = f"{{{{ {_literal(self.before_user)} }}}}"
        if self.system_opens_user:
            opened = "loop.index0 == 1 and messages[0]['role'] == 'system'"
            before_user = f"{{% if not ({opened}) %}}{before_user}{{% endif %}}"
        return "".join(
            (
                "{% macro plain(content) %}{% if content is string %}{{ content }}{% else %}"
                "{% for part in content %}{{ part['text'] }}{% endfor %}{% endif %}{% endmacro %}",
                "{% macro asked(content) %}{% set text %}{% if content is string %}{{ content }}{% else %}",
                "{% set count = content|selectattr('type', 'in', ['image', 'image_url'])|list|length %}",
                "{% for part in content %}{% if part['type'] in ['image', 'image_url'] %}",
                f"{IMAGE_PLACEHOLDER}{{% if count > 1 and not loop.last %}}{{{{ '\\n' }}}}{{% endif %}}",
                "{% else %}{{ part['text'] }}{% endif %}{% endfor %}",
                f"{{% endif %}}{{% endset %}}{asked}{{% endmacro %}}",
                f"{{% if messages[0]['role'] == 'system' %}}{system}",
                f"{{% else %}}{{{{ {_literal(self._default_system())} }}}}{{% endif %}}",
                "{% for message in messages %}{% if message['role'] == 'user' %}",
                f"{before_user}{{{{ asked(message['content']) }}}}",
                "{% elif message['role'] == 'assistant' %}",
                f"{{{{ {_literal(self.before_answer + self.answer_lead)} }}}}",
                f"{{{{ plain(message['content']) }}}}{{{{ {end} }}}}{{{{ {_literal(self.after_answer)} }}}}",
                "{% endif %}{% endfor %}",
                f"{{% if add_generation_prompt %}}{{{{ {_literal(self.before_answer)} }}}}{{% endif %}}",
            )
        )

    def chat_template_for(self, tokenizer: PreTrainedTokenizerFast) -> str:
        """`chat_template`, with the beginning-of-sequence token first if the tokenizer adds one."""
        return ("{{ bos_token }}" if self.bos_text(tokenizer) else "") + self.chat_template

    def bos_text(self, tokenizer: PreTrainedTokenizerFast) -> str:
        """The beginning-of-sequence text before the whole, or ''."""
        if self.starts_with_bos:
            return special_token(tokenizer, "bos_token") or ""
        return _bos_text(tokenizer)

    def end_token_id(self, tokenizer: PreTrainedTokenizerFast) -> int:
        """Id of the token that closes an answer, at which generation must stop."""
        end = special_token(tokenizer, "eos_token") if self.end_token is None else self.end_token
        if end is None:
            raise ValueError(f"template {self.name!r} ends answers with eos_token; the tokenizer has none")
        token_id = tokenizer.get_vocab().get(end)
        if token_id is None:
            raise ValueError(
                f"template {self.name!r} ends answers with {end!r}, which is no token of the tokenizer; "
                "add it as a special token or choose another template"
            )
        return token_id

    def _default_system(self) -> str:
        return f"{self.before_system}{self.system}{self.after_system}" if self.system else ""


def _literal(text: str) -> str:
    """Jinja string literal."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"


def special_token(tokenizer: PreTrainedTokenizerFast, name: str) -> str | None:
    """Text of that token of the tokenizer; None where it has none."""
    return tokenizer.special_tokens_map.get(name)


def _bos_text(tokenizer: PreTrainedTokenizerFast) -> str:
    """Beginning-of-sequence token if the tokenizer puts one before a text by itself, else nothing."""
    bos = special_token(tokenizer, "bos_token")
    if bos is None or tokenizer("a")["input_ids"][0] != tokenizer.convert_tokens_to_ids(bos):
        return ""
    return bos
