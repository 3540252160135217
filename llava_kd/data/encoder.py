"""A record as tokens, with the mask of its answers.

The whole text is tokenised once, and a token is a target if its characters lie in a target segment of the
template. No string is searched for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from llava_kd.batch import IGNORE_INDEX
from llava_kd.data.conversation import IMAGE_PLACEHOLDER, Record
from llava_kd.data.spans import target_spans
from llava_kd.data.template import Segment, Template, special_token


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
        segments = self.template.render(
            record.turns, eos_token=special_token(self.tokenizer, "eos_token") or ""
        )
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
        eos = special_token(self.tokenizer, "eos_token") or ""
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


def _merged(segments: list[Segment]) -> list[Segment]:
    """Neighbours of the same kind as one, without empty ones: a token may lie across their edge."""
    merged: list[Segment] = []
    for segment in segments:
        if merged and merged[-1].is_target == segment.is_target:
            merged[-1] = Segment(merged[-1].text + segment.text, segment.is_target)
        elif segment.text:
            merged.append(segment)
    return merged
