"""A micro-batch taken apart into its records' questions, and laid out again with other answers to them.

What stands between two answers, with its images, stays as each side's template and tokenizer made it; an
answer is the same tokens on both sides. No text is made, so nothing is tokenised a second time.

Shape legend: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from llava_kd.batch import IGNORE_INDEX, Batch, Inputs, Places


@dataclass(frozen=True)
class Prompt:
    """Tokens that stand before an answer, from the end of the one before; `visual` are those of images."""

    ids: Tensor
    visual: Tensor


@dataclass
class _Side:
    """One model's view of a record: prompts to come, and what is laid out so far."""

    prompts: list[Prompt]
    ids: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    visual: list[Tensor] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(map(len, self.ids))

    @property
    def num_needed(self) -> int:
        """Prompts that must follow, for no image can be left out: up to the last with one."""
        return max((k for k, prompt in enumerate(self.prompts, 1) if bool(prompt.visual.any())), default=0)

    @property
    def length_asked(self) -> int:
        """Tokens with the next prompt, and all that must follow it."""
        return len(self) + sum(len(prompt.ids) for prompt in self.prompts[: max(1, self.num_needed)])

    def ask(self) -> None:
        prompt = self.prompts.pop(0)
        self._add(prompt.ids, torch.full_like(prompt.ids, IGNORE_INDEX), prompt.visual)

    def answer(self, ids: Tensor) -> None:
        self._add(ids, ids, torch.zeros_like(ids, dtype=torch.bool))

    def close(self) -> None:
        for _ in range(self.num_needed):
            self.ask()
        self.prompts.clear()

    def _add(self, ids: Tensor, labels: Tensor, visual: Tensor) -> None:
        self.ids.append(ids)
        self.labels.append(labels)
        self.visual.append(visual)


class Talk:
    """A record on both sides. Its prompts are answered in turn, each behind the answers before it.

    A talk ends early behind an answer that did not end, and where no token of another answer would fit.
    `room` is how many tokens the next answer may have; 0 where none is asked for.
    """

    def __init__(
        self, name: str, sides: Sequence[Sequence[Prompt]], *, num_answers: int, max_length: int
    ) -> None:
        """`num_answers`: so many of the prompts have one; what follows stays only as far as it has an image.

        ValueError for sides with other numbers of prompts.
        """
        if len({len(prompts) for prompts in sides}) > 1:
            raise ValueError(f"record {name!r}: student and teacher must read the same number of answers")
        self.name, self.turn, self._max_length = name, 0, max_length
        self._sides = [_Side(list(prompts)) for prompts in sides]
        self._num_answers = num_answers
        self.room = self._room if num_answers else 0
        for side in self._sides:
            side.ask()
            if self.room == 0:
                side.close()

    @property
    def _room(self) -> int:
        """With the next prompt."""
        return max(0, self._max_length - max(side.length_asked for side in self._sides))

    @property
    def prompt(self) -> Prompt:
        """What the student reads up to the answer, from the first token on."""
        side = self._sides[0]
        return Prompt(torch.cat(side.ids), torch.cat(side.visual))

    @property
    def num_to_come(self) -> int:
        """Answers behind the one that is asked now."""
        return self._num_answers - self.turn - 1

    @property
    def num_visual(self) -> int:
        """Tokens of images that the student reads, in all of the record."""
        side = self._sides[0]
        return sum(
            int(visual.sum()) for visual in (*side.visual, *(prompt.visual for prompt in side.prompts))
        )

    def answer(self, ids: Tensor, *, is_ended: bool) -> bool:
        """Take the answer, its end token included, as far as there is room; whether it was cut."""
        is_cut = not is_ended or len(ids) > self.room
        for side in self._sides:
            side.answer(ids[: self.room])
        self.turn += 1
        has_next = not is_cut and self.turn < self._num_answers
        self.room = self._room if has_next else 0
        for side in self._sides:
            side.ask() if self.room else side.close()
        return is_cut

    @property
    def length(self) -> int:
        """Tokens so far, of the longer side."""
        return max(map(len, self._sides))

    @property
    def num_asked(self) -> int:
        """Tokens of the prompt that is asked now, from the end of the answer before it on."""
        return len(self._sides[0].ids[-1])

    def rows(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Ids, labels and image marks of each side."""
        return [(torch.cat(side.ids), torch.cat(side.labels), torch.cat(side.visual)) for side in self._sides]


def talks_of(batch: Batch, *, max_length: int) -> list[Talk]:
    """A talk a record, in their order; one without a target, as a bad record's, asks nothing."""
    sides = [side for side in (batch.student, batch.teacher) if side is not None]
    prompts = [_prompts(side) for side in sides]
    return [
        Talk(name, [its for its, _ in record], num_answers=record[0][1], max_length=max_length)
        for name, *record in zip(batch.record_ids, *prompts, strict=True)
    ]


def _prompts(inputs: Inputs) -> list[tuple[list[Prompt], int]]:
    """Of each record what stands before its answers and behind the last, and how many answers it has."""
    found = []
    held = (inputs.input_ids_BT, inputs.labels_BT, inputs.visual_BT, inputs.segment_ids_BT)
    for *row, segments in zip(*(tensor.cpu() for tensor in held), strict=True):
        padding, *lengths = torch.bincount(segments).tolist()
        records = zip(*(tensor.split([*lengths, padding])[: len(lengths)] for tensor in row), strict=True)
        found += [_prompts_of(*record) for record in records]
    return found


def _prompts_of(ids: Tensor, labels: Tensor, visual: Tensor) -> tuple[list[Prompt], int]:
    is_target = (labels != IGNORE_INDEX).int()
    edges = torch.nn.functional.pad(is_target, (1, 1)).diff()
    starts, stops = ((edges == edge).nonzero().squeeze(1).tolist() for edge in (1, -1))
    spans = zip([0, *stops], [*starts, len(ids)], strict=True)
    return [Prompt(ids[first:last], visual[first:last]) for first, last in spans], len(starts)


def with_answers(batch: Batch, talks: Sequence[Talk], *, row_tokens: int | None = None) -> Batch:
    """The batch with the talks in place of its records: the same images, in the same places.

    A talk a row; or, of a packed batch, as many in a row as come to `row_tokens` on both sides, in their
    order: answers longer than the data's take more rows.
    """
    rows = _rows_of(talks, row_tokens if batch.student.is_packed else None)
    sides = list(zip(*(talk.rows() for talk in talks), strict=True))
    student = _laid_out(batch.student, sides[0], rows)
    teacher = None if batch.teacher is None else _laid_out(batch.teacher, sides[1], rows)
    num_shared = None if teacher is None else len(teacher.places.response_N)
    return replace(batch, student=student, teacher=teacher, num_shared_targets=num_shared, own_answers=True)


def _rows_of(talks: Sequence[Talk], row_tokens: int | None) -> list[int]:
    """How many talks each row holds."""
    rows, room = [], 0
    for talk in talks:
        if row_tokens is None or not rows or talk.length > room:
            rows.append(0)
            room = row_tokens or 0
        rows[-1] += 1
        room -= talk.length
    return rows


def _laid_out(like: Inputs, records: Sequence[tuple[Tensor, Tensor, Tensor]], rows: Sequence[int]) -> Inputs:
    """Right-padded rows of so many records each, as the loader lays them; the images are those of `like`."""
    ids, labels, visual = (_joined(parts, rows) for parts in zip(*records, strict=True))
    places = _joined([torch.arange(len(record)) for record, *_ in records], rows)
    numbers = [torch.arange(1, number + 1) for number in rows]
    of_records = torch.tensor([len(record) for record, *_ in records]).split(list(rows))
    segments = [
        number.repeat_interleave(lengths) for number, lengths in zip(numbers, of_records, strict=True)
    ]
    input_ids_BT, labels_BT, visual_BT, position_ids_BT, segment_ids_BT = (
        torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)
        for values, fill in ((ids, 0), (labels, IGNORE_INDEX), (visual, 0), (places, 0), (segments, 0))
    )
    lengths_B1 = torch.tensor([[len(row)] for row in ids])
    behind_BT = torch.arange(input_ids_BT.shape[1]) - lengths_B1
    position_ids_BT = torch.where(behind_BT >= 0, behind_BT, position_ids_BT)  # padding counts anew
    image_is_valid_I = like.image_is_valid_I.cpu()
    laid_out = Inputs(
        input_ids_BT=input_ids_BT,
        labels_BT=labels_BT,
        position_ids_BT=position_ids_BT,
        segment_ids_BT=segment_ids_BT,
        visual_BT=visual_BT,
        pixels_ICHW=like.pixels_ICHW,
        image_is_valid_I=image_is_valid_I,
        is_packed=max(rows) > 1,
        known_places=Places.find(
            labels_BT=labels_BT,
            visual_BT=visual_BT,
            position_ids_BT=position_ids_BT,
            image_is_valid_I=image_is_valid_I,
        ),
    )
    return laid_out.to(like.pixels_ICHW.device)


def _joined(records: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
    """Each row's records, one after the other."""
    remaining = iter(records)
    return [torch.cat([next(remaining) for _ in range(number)]) for number in rows]
