"""Conversation templates: one rendering for training, label masks, evaluation and the stock chat template.

A template gives text in segments; the segments that are answers are the targets. The whole text is
tokenised once, and a token is a target if its characters lie in a target segment. No string is searched for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from llava_kd.batch import IGNORE_INDEX
from llava_kd.data.conversation import IMAGE_PLACEHOLDER, Record, Turn
from llava_kd.data.spans import target_spans

LLAVA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True)
class Segment:
    text: str
    is_target: bool


@dataclass(frozen=True, kw_only=True)
class Template:
    """How turns become text.

    `before_answer` is the generation prompt; `answer_lead` follows it and is already a target, so that the
    space before a word, which is part of the word's token in most tokenizers, never straddles the boundary.
    `end_token` closes an answer and is a target; None is the tokenizer's own end-of-sequence token.
    With `images_only`, a user turn keeps its images and loses its words. `starts_with_bos` puts the
    beginning-of-sequence token first also where the tokenizer does not.
    """

    name: str
    system: str = ""
    before_system: str = ""
    after_system: str = ""
    before_user: str = ""
    before_answer: str = ""
    answer_lead: str = ""
    end_token: str | None = None
    after_answer: str = ""
    images_only: bool = False
    starts_with_bos: bool = False

    def render(self, turns: Sequence[Turn], *, eos_token: str) -> list[Segment]:
        """Segments of the turns. Turns that end with the user's end with the generation prompt."""
        segments = [Segment(self._default_system(), False)]
        for turn in turns:
            if turn.role == "user":
                text = turn.text
                if self.images_only:
                    text = IMAGE_PLACEHOLDER * text.count(IMAGE_PLACEHOLDER)
                segments.append(Segment(f"{self.before_user}{text}{self.before_answer}", False))
            else:
                end = eos_token if self.end_token is None else self.end_token
                segments.append(Segment(f"{self.answer_lead}{turn.text}{end}", True))
                segments.append(Segment(self.after_answer, False))
        return [segment for segment in segments if segment.text]

    @property
    def chat_template(self) -> str:
        """Jinja text that renders the same as `render`, for a tokenizer that adds no token of its own."""
        end = "eos_token" if self.end_token is None else _literal(self.end_token)
        if self.images_only:
            part = f"{{% if part['type'] == 'image' %}}{IMAGE_PLACEHOLDER}{{% endif %}}"
            user_text = (
                f"{{{{ {_literal(IMAGE_PLACEHOLDER)} * content.count({_literal(IMAGE_PLACEHOLDER)}) }}}}"
            )
        else:
            part = (
                f"{{% if part['type'] == 'image' %}}{IMAGE_PLACEHOLDER}"
                "{% if not loop.last %}{{ '\\n' }}{% endif %}{% else %}{{ part['text'] }}{% endif %}"
            )
            user_text = "{{ content }}"
        return "".join(
            (
                "{% macro plain(content) %}{% if content is string %}{{ content }}{% else %}"
                "{% for part in content %}{{ part['text'] }}{% endfor %}{% endif %}{% endmacro %}",
                f"{{% macro asked(content) %}}{{% if content is string %}}{user_text}{{% else %}}",
                f"{{% for part in content %}}{part}{{% endfor %}}{{% endif %}}{{% endmacro %}}",
                "{% if messages[0]['role'] == 'system' %}",
                f"{{{{ {_literal(self.before_system)} }}}}{{{{ plain(messages[0]['content']) }}}}",
                f"{{{{ {_literal(self.after_system)} }}}}",
                f"{{% else %}}{{{{ {_literal(self._default_system())} }}}}{{% endif %}}",
                "{% for message in messages %}{% if message['role'] == 'user' %}",
                f"{{{{ {_literal(self.before_user)} }}}}{{{{ asked(message['content']) }}}}",
                "{% elif message['role'] == 'assistant' %}",
                f"{{{{ {_literal(self.before_answer + self.answer_lead)} }}}}",
                f"{{{{ plain(message['content']) }}}}{{{{ {end} }}}}{{{{ {_literal(self.after_answer)} }}}}",
                "{% endif %}{% endfor %}",
                f"{{% if add_generation_prompt %}}{{{{ {_literal(self.before_answer)} }}}}{{% endif %}}",
            )
        )

    def chat_template_for(self, tokenizer: PreTrainedTokenizerFast) -> str:
        """`chat_template`, with the beginning-of-sequence token first where the tokenizer puts one."""
        return ("{{ bos_token }}" if self.bos_text(tokenizer) else "") + self.chat_template

    def bos_text(self, tokenizer: PreTrainedTokenizerFast) -> str:
        """What stands before the whole text."""
        if self.starts_with_bos:
            return _special(tokenizer, "bos_token") or ""
        return _bos_text(tokenizer)

    def end_token_id(self, tokenizer: PreTrainedTokenizerFast) -> int:
        """Id of the token that closes an answer, at which generation must stop."""
        end = _special(tokenizer, "eos_token") if self.end_token is None else self.end_token
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


TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        # Image, then caption. LLaVA closes the caption with a newline; an end token lets generation stop.
        Template(name="plain", images_only=True),
        Template(
            name="vicuna",
            after_system=" ",
            before_user="USER: ",
            before_answer=" ASSISTANT:",
            answer_lead=" ",
        ),
        Template(
            name="llava_v1",
            system=LLAVA_SYSTEM,
            after_system=" ",
            before_user="USER: ",
            before_answer=" ASSISTANT:",
            answer_lead=" ",
        ),
        Template(
            name="chatml",
            before_system="<|im_start|>system\n",
            after_system="<|im_end|>\n",
            before_user="<|im_start|>user\n",
            before_answer="<|im_end|>\n<|im_start|>assistant\n",
            end_token="<|im_end|>",
            after_answer="\n",
        ),
        Template(
            name="llama3",
            before_system="<|start_header_id|>system<|end_header_id|>\n\n",
            after_system="<|eot_id|>",
            before_user="<|start_header_id|>user<|end_header_id|>\n\n",
            before_answer="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            end_token="<|eot_id|>",
        ),
        Template(
            name="gemma",
            before_user="<start_of_turn>user\n",
            before_answer="<end_of_turn>\n<start_of_turn>model\n",
            end_token="<end_of_turn>",
            after_answer="\n",
        ),
        Template(
            name="phi3",
            before_system="<|system|>\n",
            after_system="<|end|>\n",
            before_user="<|user|>\n",
            before_answer="<|end|>\n<|assistant|>\n",
            end_token="<|end|>",
            after_answer="\n",
        ),
        Template(
            name="phi4",
            before_system="<|im_start|>system<|im_sep|>",
            after_system="<|im_end|>",
            before_user="<|im_start|>user<|im_sep|>",
            before_answer="<|im_end|><|im_start|>assistant<|im_sep|>",
            end_token="<|im_end|>",
        ),
        # OLMo 2: words, not tokens, mark its turns.
        Template(
            name="tulu",
            before_system="<|system|>\n",
            after_system="\n",
            before_user="<|user|>\n",
            before_answer="\n<|assistant|>\n",
            after_answer="\n",
            starts_with_bos=True,
        ),
    )
}


def _literal(text: str) -> str:
    """Jinja string literal."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"


def _special(tokenizer: PreTrainedTokenizerFast, name: str) -> str | None:
    return tokenizer.special_tokens_map.get(name)


def _bos_text(tokenizer: PreTrainedTokenizerFast) -> str:
    """Beginning-of-sequence token if the tokenizer puts one before a text by itself, else nothing."""
    bos = _special(tokenizer, "bos_token")
    if bos is None or tokenizer("a")["input_ids"][0] != tokenizer.convert_tokens_to_ids(bos):
        return ""
    return bos


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One record as tokens. `labels` are not shifted; `visual` marks the image positions.

    `spans` has of each target the number of its answer, the first and last character of it that it covers
    (none: both the same), and whether it reaches beyond the answer into what the template puts around it.
    """

    ids: Tensor
    labels: Tensor
    visual: Tensor
    spans: Tensor = field(default_factory=lambda: torch.zeros(0, 4, dtype=torch.int32))
    is_truncated: bool = False


class Encoder:
    """Turns records into tokens for one model."""

    def __init__(
        self,
        *,
        template: Template,
        tokenizer: PreTrainedTokenizerFast,
        image_token_id: int,
        tokens_per_image: int,
        max_length: int,
    ) -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                "label masks need a fast tokenizer, which gives the place of each token in the text"
            )
        self.template = template
        self.tokenizer = tokenizer
        self.image_token_id = image_token_id
        self.tokens_per_image = tokens_per_image
        self.max_length = max_length
        self._end_id = template.end_token_id(tokenizer)
        self._bos = template.bos_text(tokenizer)

    def __call__(self, record: Record) -> Encoded:
        """Tokens and labels; each image placeholder becomes `tokens_per_image` ids.

        A record longer than `max_length` loses its end. ValueError, naming the record, if that would cut an
        image or leave no target, or if a token lies across the edge of an answer.
        """
        ids, is_target, spans = self._tokenise(record)
        is_image = ids == self.image_token_id
        if int(is_image.sum()) != len(record.images):
            raise ValueError(
                f"record {record.id!r}: {IMAGE_PLACEHOLDER} must be one token, id {self.image_token_id}; "
                f"its text has {int(is_image.sum())} such tokens for {len(record.images)} images"
            )
        repeats = torch.where(is_image, self.tokens_per_image, 1)
        ids, is_target, visual, spans = (
            x.repeat_interleave(repeats, dim=0) for x in (ids, is_target, is_image, spans)
        )
        is_target[0] = False
        end = self.max_length
        is_truncated = len(ids) > end
        if is_truncated and bool(visual[end:].any()):
            raise ValueError(
                f"record {record.id!r}: its {len(ids)} tokens do not fit into max_length {end} without "
                "cutting an image; raise max_length or remove the record"
            )
        ids, is_target, visual, spans = ids[:end], is_target[:end], visual[:end], spans[:end]
        if not bool(is_target.any()):
            raise ValueError(
                f"record {record.id!r}: no token of its answers is left within max_length {end}; raise "
                "max_length or remove the record"
            )
        labels = torch.where(is_target, ids, IGNORE_INDEX)
        return Encoded(ids=ids, labels=labels, visual=visual, spans=spans, is_truncated=is_truncated)

    def lengths(self, records: Sequence[Record]) -> list[int]:
        """Number of tokens of each record: exact, or an upper bound for a record that has no encoding."""
        texts = ["".join(segment.text for segment in self._segments(record)) for record in records]
        encodings = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        more = self.tokens_per_image - 1
        return [
            min(len(ids) + more * len(record.images), self.max_length)
            for ids, record in zip(encodings["input_ids"], records, strict=True)
        ]

    def _segments(self, record: Record) -> list[Segment]:
        segments = self.template.render(record.turns, eos_token=_special(self.tokenizer, "eos_token") or "")
        return _merged([Segment(self._bos, False), *segments])

    def _tokenise(self, record: Record) -> tuple[Tensor, Tensor, Tensor]:
        """Ids of the rendered record, which of them are targets, and their spans; an image is one token."""
        segments = self._segments(record)
        encoding = self.tokenizer(
            "".join(segment.text for segment in segments),
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
        is_target = self._targets(record, segments, ids, offsets)
        answers = sum(turn.role == "assistant" for turn in record.turns)
        ends = sum(i == self._end_id and target for i, target in zip(ids, is_target, strict=True))
        if ends < answers:
            raise ValueError(f"record {record.id!r}: the end of an answer was not tokenised as one token")
        return torch.tensor(ids), torch.tensor(is_target), self._spans(record, is_target, offsets)

    def _spans(self, record: Record, is_target: list[bool], offsets: list[tuple[int, int]]) -> Tensor:
        place, answers = len(self._bos), []
        eos = _special(self.tokenizer, "eos_token") or ""
        end = len(eos if self.template.end_token is None else self.template.end_token)
        for segment in self.template.render(record.turns, eos_token=eos):
            stop = place + len(segment.text)
            if segment.is_target:
                answers.append((stop, place + len(self.template.answer_lead), stop - end))
            place = stop
        return target_spans(answers, is_target, offsets)

    def _targets(
        self, record: Record, segments: list[Segment], ids: list[int], offsets: list[tuple[int, int]]
    ) -> list[bool]:
        """Whether each token lies in a target segment, by its characters' places in the text.

        An end token that swallows the white space behind it, as Phi-3's does, still ends its answer.
        """
        is_target = []
        edge = covered = 0
        remaining = iter(segments)
        segment = Segment("", False)
        text = "".join(segment.text for segment in segments)
        for token_id, (start, stop) in zip(ids, offsets, strict=True):
            start = min(start, covered)  # whitespace that a tokenizer trims off belongs to the next token
            while start >= edge and (following := next(remaining, None)) is not None:
                segment = following
                edge += len(segment.text)
            if stop > edge and (token_id != self._end_id or text[edge:stop].strip()):
                raise ValueError(
                    f"record {record.id!r}: a token lies across the edge of an answer, after "
                    f"{segment.text[-20:]!r}: template {self.template.name!r} gives no sound label mask with "
                    "this tokenizer; choose another template"
                )
            is_target.append(segment.is_target)
            covered = max(covered, stop)
        return is_target


def encode(
    record: Record,
    *,
    template: Template,
    tokenizer: PreTrainedTokenizerFast,
    image_token_id: int,
    tokens_per_image: int,
    max_length: int,
) -> Encoded:
    """Tokens and labels of one record; see `Encoder`, which is quicker for many."""
    encoder = Encoder(
        template=template,
        tokenizer=tokenizer,
        image_token_id=image_token_id,
        tokens_per_image=tokens_per_image,
        max_length=max_length,
    )
    return encoder(record)


def _merged(segments: list[Segment]) -> list[Segment]:
    """Neighbours of the same kind as one, without empty ones: a token may lie across their edge."""
    merged: list[Segment] = []
    for segment in segments:
        if merged and merged[-1].is_target == segment.is_target:
            merged[-1] = Segment(merged[-1].text + segment.text, segment.is_target)
        elif segment.text:
            merged.append(segment)
    return merged
