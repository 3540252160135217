"""Which places of a batch a term reads: rows of responses, rows of visual tokens, features of images.

Shape legend: B rows, T tokens, N selected rows, M visual tokens of an image, I images, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llava_kd.batch import IGNORE_INDEX, Batch, Counts, Inputs
from llava_kd.models.mllm import Prediction

Place = Literal["response", "visual"]
VisualTap = Literal["logits", "hidden", "projector"]


def count(counts: Counts, name: str) -> Tensor:
    """A denominator of the step, at least 1. ValueError where the step has none of that name."""
    if name not in counts:
        raise ValueError(f"the step counts no {name!r}; it counts {', '.join(counts)}")
    return counts[name].clamp_min(1)


def targets_of_rows(inputs: Inputs, rows_N: Tensor) -> Tensor:
    return inputs.targets_BT.flatten()[rows_N]


def response_rows(inputs: Inputs) -> Tensor:
    """Flat positions whose next token is a target."""
    return inputs.places.response_N


def visual_rows(inputs: Inputs) -> Tensor:
    """Flat positions of valid visual tokens: their own prediction is distilled, it is not shifted."""
    return inputs.places.distilled_N


def visual_features(prediction: Prediction, inputs: Inputs, tap: VisualTap) -> Tensor:
    """[I, M, D] of the tap; the logits tap reads hidden states, its head is applied by the loss.

    ValueError for a prediction without the projector's output: nothing may be broadcast in its place.
    """
    if tap == "projector":
        if prediction.projected_IND.shape[0] != inputs.num_images:
            raise ValueError(
                f"the batch has {inputs.num_images} images and the prediction the projector's output of "
                f"{prediction.projected_IND.shape[0]}: a cache of the teacher was written without it"
            )
        return prediction.projected_IND
    return of_images(prediction.hidden_BTD, inputs)


def of_images(states_BTD: Tensor, inputs: Inputs) -> Tensor:
    """[I, M, D] of states of every place."""
    states_D = states_BTD.flatten(0, 1)[inputs.places.visual_N]
    if inputs.num_images == 0:
        return states_D.view(0, 1, states_BTD.shape[2])
    return states_D.view(inputs.num_images, -1, states_D.shape[1])


def fill(rows: Rows, value: Tensor | float) -> Tensor:
    """One fp32 weight a row, without waiting for the device."""
    ones_N = torch.ones(len(rows.student_N), device=rows.student_N.device)
    return ones_N * (value.float() if isinstance(value, Tensor) else value)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Flat positions of one kind of row on both sides; the same count, in the same order.

    `is_shared_N` is 0 where the two sides answer with other tokens, as at the edges of two templates.
    """

    place: Place
    student_N: Tensor
    teacher_N: Tensor
    targets_N: Tensor
    is_shared_N: Tensor

    def take(self, picked_N: Tensor) -> Rows:
        """Those of these numbers, in their order."""
        return Rows(
            place=self.place,
            student_N=self.student_N[picked_N],
            teacher_N=self.teacher_N[picked_N],
            targets_N=self.targets_N[picked_N],
            is_shared_N=self.is_shared_N[picked_N],
        )

    @staticmethod
    def select(place: Place, batch: Batch, *, with_teacher: bool) -> Rows:
        choose = response_rows if place == "response" else visual_rows
        student_N = choose(batch.student)
        teacher_N = student_N
        if with_teacher and batch.teacher is not None:
            teacher_N = choose(batch.teacher)
            if len(teacher_N) != len(student_N):
                raise ValueError(
                    f"{place} rows must line up: the student has {len(student_N)}, the teacher "
                    f"{len(teacher_N)}, in the records {', '.join(batch.record_ids)}"
                )
        if place == "response":
            targets_N = targets_of_rows(batch.student, student_N)
        else:
            targets_N = torch.full_like(student_N, IGNORE_INDEX)
        is_shared_N = torch.ones(len(student_N), device=student_N.device)
        if place == "response" and with_teacher and batch.teacher is not None:
            is_shared_N = (targets_of_rows(batch.teacher, teacher_N) == targets_N).float()
        return Rows(
            place=place,
            student_N=student_N,
            teacher_N=teacher_N,
            targets_N=targets_N,
            is_shared_N=is_shared_N,
        )
