"""A record and its pictures as a model's own processor gives them, with the places of the answers.

Shape legend: T tokens.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from llava_kd.batch import IGNORE_INDEX
from llava_kd.data.foreign.own_inputs import OwnInputs
from llava_kd.data.foreign.talks import Rendered, Talks, tokenizer_of
from llava_kd.data.sources.conversation import Record
from llava_kd.data.text.encoder import Encoded

_OFFSETS, _REPLACED = "offset_mapping", "text_replacement_offsets"
_ASKED = f"return_{_REPLACED}"
_OURS = ("input_ids", "attention_mask", "labels", _OFFSETS, _REPLACED)


@dataclass(frozen=True, kw_only=True)
class Read:
    """Tokens with their labels and spans, and what the processor gives beside them."""

    encoded: Encoded
    own: OwnInputs


class Reader:
    """Turns records and decoded pictures into what one model reads. Not shared between threads."""

    def __init__(
        self,
        processor: ProcessorMixin,
        max_tokens: int | None = None,
        *,
        visual_token: int | None = None,
        tokens_per_image: int = 0,
    ) -> None:
        """`max_tokens`: a record of more is refused, for no picture is ever cut.

        `visual_token` holds the features of pictures, `tokens_per_image` of each; None marks none of them.
        """
        self._processor = processor
        self._tokenizer = tokenizer_of(processor)
        self._talks = Talks(processor)
        self._max_tokens = max_tokens
        self._visual_token = visual_token
        self._tokens_per_image = tokens_per_image

    def __call__(self, record: Record, images: Sequence[Tensor]) -> Read:
        """`images` are uint8 [H, W, 3]. ValueError, naming the record, where it cannot be read."""
        if record.fault:
            raise ValueError(record.fault)
        rendered = self._talks(record)
        given = self._given(record, rendered, images)
        ids = given["input_ids"][0]
        answers = _moved(record, rendered, given, len(images))
        targets = _targets(answers, given[_OFFSETS][0].tolist())
        if targets and targets[-1][0] == len(ids):  # a template that ends no answer: what follows is its end
            end = self._tokenizer.eos_token_id
            targets = targets[:-1] if end is None else targets
            ids = ids if end is None else torch.cat([ids, ids.new_tensor([end])])
        if self._max_tokens is not None and len(ids) > self._max_tokens:
            raise ValueError(
                f"record {record.id!r}: its {len(ids)} tokens are more than the {self._max_tokens} that the "
                "teacher has positions for; make its image processor give smaller pictures, or remove the "
                "record"
            )
        spans = torch.zeros(len(ids), 4, dtype=torch.int32)
        labels = torch.full_like(ids, IGNORE_INDEX)
        for place, span in targets:
            spans[place] = torch.tensor(span, dtype=torch.int32)
            labels[place] = ids[place]
        encoded = Encoded(ids=ids, labels=labels, visual=self._visual(record, ids, len(images)), spans=spans)
        return Read(encoded=encoded, own=self._own(record, given, len(ids)))

    def _visual(self, record: Record, ids: Tensor, num_images: int) -> Tensor:
        if self._visual_token is None:
            return torch.zeros_like(ids, dtype=torch.bool)
        is_visual = ids == self._visual_token
        if (found := int(is_visual.sum())) != num_images * self._tokens_per_image:
            raise ValueError(
                f"record {record.id!r}: the teacher's processor makes {found} visual tokens of its "
                f"{num_images} pictures; it must make {self._tokens_per_image} of each, as of the pictures "
                "that were tried"
            )
        return is_visual

    def question(self, record: Record) -> str:
        """The text before a record's first answer, pictures as placeholders."""
        rendered = self._talks(record)
        return rendered.text[: rendered.answers[0][0]]

    def _given(self, record: Record, rendered: Rendered, images: Sequence[Tensor]) -> Mapping:
        """What the processor makes of it. A text that begins with the first token gets no second one."""
        bos = self._tokenizer.bos_token
        asked: dict[str, Any] = {
            "text": [rendered.text],
            "return_tensors": "pt",
            "return_offsets_mapping": True,
            _ASKED: True,
        }
        if isinstance(bos, str) and rendered.text.startswith(bos):
            asked["add_special_tokens"] = False
        if images:
            asked["images"] = [[Image.fromarray(image.numpy()) for image in images]]
        try:
            return self._processor(**asked)
        except Exception as error:  # processors and the tokenizers library raise what they like
            raise ValueError(
                f"record {record.id!r}: the teacher's {type(self._processor).__name__} cannot read it: "
                f"{' '.join(str(error).split())}"
            ) from error

    def _own(self, record: Record, given: Mapping, length: int) -> OwnInputs:
        by_token: dict[str, Tensor] = {}
        by_picture: dict[str, Tensor] = {}
        written = given["input_ids"].shape
        for name, value in given.items():
            if name in _OURS:
                continue
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"record {record.id!r}: the teacher's {type(self._processor).__name__} gives {name} as "
                    f"{type(value).__name__}, not as one tensor; use another teacher"
                )
            if value.shape == written:
                by_token[name] = torch.nn.functional.pad(value[0], (0, length - written[1]))
            else:
                by_picture[name] = value
        return OwnInputs(by_token=by_token, by_picture=by_picture)


def _moved(record: Record, rendered: Rendered, given: Mapping, num_images: int) -> list[tuple[int, int]]:
    """Where the answers are once the placeholders of pictures have become as many words as they take."""
    listed = given.get(_REPLACED)
    replaced = [] if listed is None or not len(listed) else list(listed[0])
    if len(replaced) != num_images:
        raise ValueError(
            f"record {record.id!r}: the teacher's processor does not report where its {num_images} pictures "
            f"are in the text (it reports {len(replaced)}): use transformers 5.23, or a processor of the "
            "model's own kind"
        )
    ends = [one["span"][1] for one in replaced]
    gained = [0, *(one["new_span"][1] - one["span"][1] for one in replaced)]
    return [
        (start + gained[bisect_right(ends, start)], stop + gained[bisect_right(ends, start)])
        for start, stop in rendered.answers
    ]


def _targets(
    answers: Sequence[tuple[int, int]], offsets: Sequence[Sequence[int]]
) -> list[tuple[int, tuple[int, int, int, int]]]:
    """Place and span (see `Encoded.spans`) of each token of the answers, and of the one behind each.

    The one behind an answer ends it; behind a last answer with nothing after it that is the place after all.
    """
    found: list[tuple[int, tuple[int, int, int, int]]] = []
    covered, i = 0, 0
    for number, (begin, end) in enumerate(answers):
        while i < len(offsets) and (offsets[i][1] <= begin or i == 0):
            covered, i = max(covered, offsets[i][1]), i + 1
        while i < len(offsets) and min(offsets[i][0], covered) < end:
            start, stop = min(offsets[i][0], covered), offsets[i][1]
            first, last = (min(max(place, begin), end) - begin for place in (start, stop))
            found.append((i, (number, first, last, int(start < begin or stop > end))))
            covered, i = max(covered, stop), i + 1
        found.append((i, (number, end - begin, end - begin, 1)))
    return found
