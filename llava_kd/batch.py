"""What flows between the rooms.

Shape legend: B rows, T tokens, I images, C channels, H height, W width, M places with a stored prediction,
N tokens of an image, E teacher width, K stored columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

IGNORE_INDEX = -100


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What one model reads.

    A row is right-padded and holds one record or, packed, several: `segment_ids_BT` is 0 on padding and
    1, 2, ... on the records of a row, `position_ids_BT` restarts at each of them. The first token of a
    record is never a target. `visual_BT` marks the positions that receive projected image features, in
    the order of `pixels_ICHW`; every image fills the same number of positions. `image_is_valid_I` is False
    for the stand-in of an image that could not be read: it fills its place but is not distilled.
    `is_packed` is True where some row holds more than one record.
    """

    input_ids_BT: Tensor
    labels_BT: Tensor
    position_ids_BT: Tensor
    segment_ids_BT: Tensor
    visual_BT: Tensor
    pixels_ICHW: Tensor
    image_is_valid_I: Tensor
    is_packed: bool = False

    @property
    def targets_BT(self) -> Tensor:
        """Label of the next token at each position; IGNORE_INDEX where there is none."""
        return torch.nn.functional.pad(self.labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX)

    @property
    def num_images(self) -> int:
        return self.pixels_ICHW.shape[0]

    @property
    def distilled_visual_BT(self) -> Tensor:
        """Visual positions whose image is valid."""
        if self.num_images == 0:
            return self.visual_BT
        flat = self.visual_BT.flatten()
        per_image = flat.sum() // self.num_images
        image_of_token = ((flat.cumsum(0) - 1) // per_image.clamp_min(1)).clamp(0, self.num_images - 1)
        return (flat & self.image_is_valid_I[image_of_token]).view_as(self.visual_BT)

    def to(self, device: torch.device | str) -> Inputs:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "is_packed"}
        return replace(self, **{name: t.to(device, non_blocking=True) for name, t in tensors.items()})


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Denominators of one optimiser step, as float64 scalars on the device."""

    response_tokens: Tensor
    visual_tokens: Tensor
    images: Tensor

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            response_tokens=self.response_tokens + other.response_tokens,
            visual_tokens=self.visual_tokens + other.visual_tokens,
            images=self.images + other.images,
        )

    def stack(self) -> Tensor:
        return torch.stack([self.response_tokens, self.visual_tokens, self.images])

    @staticmethod
    def unstack(values_3: Tensor) -> Counts:
        response_tokens, visual_tokens, images = values_3.unbind()
        return Counts(response_tokens=response_tokens, visual_tokens=visual_tokens, images=images)


@dataclass(frozen=True, kw_only=True)
class TeacherRows:
    """Stored predictions of a teacher for one micro-batch, at flat places of the side that it reads.

    Either final hidden states, and the projector's output where it was kept; or, of each place, the largest
    logits, their columns, and the log of what exp(logit / temperature) sums to over the columns left out.
    """

    places_M: Tensor
    hidden_ME: Tensor | None = None
    projected_INE: Tensor | None = None
    top_logits_MK: Tensor | None = None
    top_columns_MK: Tensor | None = None
    rest_M: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> TeacherRows:
        """The same with every tensor changed."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: change(t) for name, t in tensors.items() if t is not None})


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch. `teacher` is None where the teacher reads exactly what the student reads.

    `teacher_rows` is what a cache holds of the teacher, where one stands in for it.
    """

    student: Inputs
    teacher: Inputs | None = None
    record_ids: tuple[str, ...] = ()
    teacher_rows: TeacherRows | None = None

    @property
    def teacher_inputs(self) -> Inputs:
        return self.student if self.teacher is None else self.teacher

    def counts(self) -> Counts:
        """Rows that each kind of loss term will sum over; a property of the student's side."""
        inputs = self.student
        return Counts(
            response_tokens=(inputs.targets_BT != IGNORE_INDEX).sum().double(),
            visual_tokens=inputs.distilled_visual_BT.sum().double(),
            images=inputs.image_is_valid_I.sum().double(),
        )

    def to(self, device: torch.device | str) -> Batch:
        teacher = None if self.teacher is None else self.teacher.to(device)
        rows = self.teacher_rows
        if rows is not None:
            rows = rows.map(lambda tensor: tensor.to(device, non_blocking=True))
        return replace(self, student=self.student.to(device), teacher=teacher, teacher_rows=rows)
