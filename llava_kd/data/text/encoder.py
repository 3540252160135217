"""A record as tokens, with the mask of its answers.

The whole text is tokenised once, and a token is a target if its characters lie in a target segment of the
template. No string is searched for. Words of a record that look like control tokens are read as text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from llava_kd.batch import IGNORE_INDEX
from llava_kd.data.sources.conversation import IMAGE_PLACEHOLDER, Record, Turn
from llava_kd.data.text.control_words import ControlWords
from llava_kd.data.text.template import Segment, Template, special_token
from llava_kd.data.text.token_spans import target_spans


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One record as tokens. `labels` are not shifted; `visual` marks the image positions.

    `spans` has of each target the number of its answer, the first and last character of it that it covers
    (none: both the same), and whether it reaches beyond the answer into what the template puts around it.
    `scores`: how likely each token is private, 0..1, where somebody asked. `stretches`: the number of the
    stretch that each target shares with the other side, 0 for none, where the sides have other tokens.
    """

    ids: Tensor
    labels: Tensor
    visual: Tensor
    spans: Tensor = field(default_factory=lambda: torch.zeros(0, 4, dtype=torch.int32))
    is_truncated: bool = False
    scores: Tensor | None = None
    stretches: Tensor | None = None


@dataclass(frozen=True)
class _Rendered:
    """Segments of a record by the template, the text that ends an answer, and who tokenises them."""

    segments: list[Segment]
    end: str
    is_renamed: bool

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments)


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
        self._eos = special_token(tokenizer, "eos_token") or ""
        talk = [Turn("user", IMAGE_PLACEHOLDER), Turn("assistant", ""), Turn("user", "")]
        written = "".join(s.text for s in template.render(talk, eos_token=self._eos))
        self._control = ControlWords(tokenizer, self._bos + written)

    def __call__(self, record: Record) -> Encoded:
        """Tokens and labels; each image placeholder becomes `tokens_per_image` ids.

        A record longer than `max_length` loses its end. ValueError, naming the record, if that would cut an
        image or leave no target, if a token lies across the edge of an answer, or for its own fault.
        """
        if record.fault:
            raise ValueError(record.fault)
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
        counts = [1] * len(records)  # the place of a record that cannot be used
        plain: list[tuple[int, str]] = []
        for number, record in enumerate(records):
            if record.fault:
                continue
            try:
                rendered = self._rendered(record)
                if rendered.is_renamed:
                    counts[number] = len(self._read(record, rendered)[0])
                else:
                    plain.append((number, rendered.text))
            except ValueError:  # its encoding says the same
                continue
        if plain:
            encodings = self.tokenizer(
                [text for _, text in plain],
                add_special_tokens=False,
                return_attention_mask=False,
                verbose=False,
            )
            for (number, _), ids in zip(plain, encodings["input_ids"], strict=True):
                counts[number] = len(ids)
        more = self.tokens_per_image - 1
        return [
            min(count + more * len(record.images), self.max_length)
            for count, record in zip(counts, records, strict=True)
        ]

    def control_words(self, record: Record) -> list[str]:
        """Words of the record's text that the tokenizer would take for control tokens, each once."""
        found = [
            word
            for turn in record.turns
            for word in self._control.found(turn.text, has_places=record.has_places(turn))
        ]
        return list(dict.fromkeys(found))

    def _rendered(self, record: Record) -> _Rendered:
        end = self._eos if self.template.end_token is None else self.template.end_token
        try:
            covered = self._control.covered([(turn.text, record.has_places(turn)) for turn in record.turns])
        except ValueError as error:
            raise ValueError(f"record {record.id!r}: {error}") from None
        turns, is_renamed = record.turns, covered is not None
        if covered is not None:
            turns = [replace(turn, text=text) for turn, text in zip(turns, covered, strict=True)]
        segments = [Segment(self._bos, False), *self.template.render(turns, eos_token=self._eos)]
        if is_renamed:
            end = self._control.renamed(end)
            segments = [replace(s, text=self._control.renamed(s.text)) for s in segments]
        return _Rendered(segments, end, is_renamed)

    def _read(self, record: Record, rendered: _Rendered) -> tuple[list[int], list[tuple[int, int]]]:
        """By the tokenizer; where words look like control tokens, by its copy that reads them as text."""
        try:
            if rendered.is_renamed:
                encoding = self._control.encode(rendered.text)
                return encoding.ids, encoding.offsets
            encodings = self.tokenizer(
                rendered.text,
                add_special_tokens=False,
                return_offsets_mapping=True,
                return_attention_mask=False,
                verbose=False,
            )
            return encodings["input_ids"], encodings["offset_mapping"]
        except Exception as error:  # the tokenizers library raises plain ones
            raise ValueError(f"record {record.id!r}: its text cannot be tokenised: {error}") from error

    def _tokenise(self, record: Record) -> tuple[Tensor, Tensor, Tensor]:
        """Ids of the rendered record, which of them are targets, and their spans; an image is one token."""
        rendered = self._rendered(record)
        ids, offsets = self._read(record, rendered)
        is_target = self._targets(record, _merged(rendered.segments), ids, offsets)
        answers = sum(turn.role == "assistant" for turn in record.turns)
        ends = sum(i == self._end_id and target for i, target in zip(ids, is_target, strict=True))
        if ends < answers:
            raise ValueError(f"record {record.id!r}: the end of an answer was not tokenised as one token")
        return torch.tensor(ids), torch.tensor(is_target), self._spans(rendered, is_target, offsets)

    def _spans(self, rendered: _Rendered, is_target: list[bool], offsets: list[tuple[int, int]]) -> Tensor:
        place, answers = 0, []
        for segment in rendered.segments:
            stop = place + len(segment.text)
            if segment.is_target:
                begin = place + len(self.template.answer_lead)
                answers.append((stop, begin, stop - len(rendered.end)))
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
                    f"record {record.id!r}: a token crosses the start or end of an answer, after "
                    f"{segment.text[-20:]!r}: template {self.template.name!r} gives no correct label mask "
                    "with this tokenizer; choose another template"
                )
            is_target.append(segment.is_target)
            covered = max(covered, stop)
        return is_target


def _merged(segments: list[Segment]) -> list[Segment]:
    """Neighbours of the same kind as one, without empty ones: a token may lie across their edge."""
    merged: list[Segment] = []
    for segment in segments:
        if merged and merged[-1].is_target == segment.is_target:
            merged[-1] = Segment(merged[-1].text + segment.text, segment.is_target)
        elif segment.text:
            merged.append(segment)
    return merged
