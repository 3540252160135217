"""Ways to teach that the library does not have, as a user would add them: one class each.

Shape legend: B rows, T tokens, I images, N tokens of an image, C channels, H height, W width, D width of a
model, E tower width, V rows of a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from llava_kd.batch import Batch, Counts, Inputs
from llava_kd.distill.rows import response_rows, targets_of_rows
from llava_kd.distill.taught import Taught
from llava_kd.distill.teaching.door import Teaching
from llava_kd.distill.teaching.from_teacher import FromTeacher
from llava_kd.distill.teaching.live import Teacher
from llava_kd.losses.head_loss import head_loss
from llava_kd.models.mllm import MLLM, Prediction


class MeanOfLogits:
    """Several teachers as one: side by side, hidden states and heads give the mean of the logits."""

    def __init__(self, teachers: Sequence[Teacher]) -> None:
        self._teachers = teachers

    def __call__(self, batch: Batch, features_INE: Tensor | None = None) -> Prediction:
        said = [teacher(batch, features_INE) for teacher in self._teachers]
        share = 1.0 / len(said)
        return Prediction(
            hidden_BTD=torch.cat([share * one.hidden_BTD for one in said], dim=2),
            projected_IND=torch.cat([one.projected_IND for one in said], dim=2),
            head_VD=torch.cat([one.head_VD for one in said], dim=1),
            bias_V=None,
        )


class Peer(Teaching):
    """A second student that learns beside the first: each is the other's teacher."""

    def __init__(self, peer: MLLM) -> None:
        self._peer = peer

    def modules(self) -> nn.Module:
        return self._peer

    def inside(self, batch: Batch, student: Prediction, features_INE: Tensor, taught: Taught) -> Taught:
        return replace(taught, prediction=self._peer(batch.student, features_INE))

    def losses(
        self, batch: Batch, student: Prediction, taught: Taught, counts: Counts
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        peer = taught.prediction
        assert isinstance(peer, Prediction)
        rows_N = response_rows(batch.student)
        share = 1.0 / counts["response_tokens"].clamp_min(1).float()
        weight_N = share * torch.ones(len(rows_N))
        result = head_loss(
            peer.hidden_BTD.flatten(0, 1)[rows_N],
            peer.head_VD,
            targets_of_rows(batch.student, rows_N),
            ce_weight_N=weight_N,
            teacher_NE=student.hidden_BTD.detach().flatten(0, 1)[rows_N],
            teacher_head_UE=student.head_VD.detach(),
            kl_weight_N=weight_N,
            num_common=260,
        )
        touched = 0.0 * (peer.hidden_BTD[:0].sum() + peer.projected_IND[:0].sum())
        means = {"peer_cross_entropy": result.ce_N.sum() * share, "peer_kl": result.kl_N.sum() * share}
        return result.loss + touched, means


class Frame(nn.Module):
    """A picture that is added to every picture, and how often it was."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.picture_CHW = nn.Parameter(torch.zeros(3, size, size))
        self.register_buffer("uses", torch.zeros((), dtype=torch.long))

    def forward(self, pixels_ICHW: Tensor) -> Tensor:
        self.uses += 1
        return pixels_ICHW + self.picture_CHW


class Framed(Teaching):
    """A learned, stateful change of the pictures, before both models."""

    changes_pictures = True

    def __init__(self, teacher: Teacher, size: int = 32) -> None:
        self._teacher, self.frame = teacher, Frame(size)

    def modules(self) -> nn.Module:
        return self.frame

    def pictures(self, batch: Batch) -> Batch:
        pixels_ICHW = self.frame(batch.student.pixels_ICHW)
        return replace(batch, student=replace(batch.student, pixels_ICHW=pixels_ICHW))

    def inside(self, batch: Batch, student: Prediction, features_INE: Tensor, taught: Taught) -> Taught:
        return Taught(prediction=self._teacher(batch, features_INE))


class Contrasted(FromTeacher):
    """A second pass of the teacher on blank pictures: what it says for the picture's sake weighs more."""

    def outside(self, batch: Batch, features_INE: Tensor | None) -> Taught:
        seen = self.predict(batch, features_INE)
        inputs = batch.teacher_inputs
        blank = replace(inputs, pixels_ICHW=torch.zeros_like(inputs.pixels_ICHW))
        guessed = self.predict(replace(batch, student=blank, teacher=None))
        assert isinstance(seen, Prediction)
        assert isinstance(guessed, Prediction)
        hidden_BTD = 2 * seen.hidden_BTD - guessed.hidden_BTD
        return Taught(prediction=replace(seen, hidden_BTD=hidden_BTD), others={"blank": guessed})


class RowTemperatures(FromTeacher):
    """Each row of the teacher at a temperature of its own, with noise on its hidden states."""

    def __init__(self, teacher: Teacher, *, noise: float) -> None:
        super().__init__(teacher)
        self._noise = noise

    def outside(self, batch: Batch, features_INE: Tensor | None) -> Taught:
        said = self.predict(batch, features_INE)
        assert isinstance(said, Prediction)
        noise_BTD = self._noise * torch.randn(said.hidden_BTD.shape)
        hidden_BTD = (said.hidden_BTD + noise_BTD) / temperatures(batch.teacher_inputs)[..., None]
        return Taught(prediction=replace(said, hidden_BTD=hidden_BTD))


def temperatures(inputs: Inputs) -> Tensor:
    """From 1 on, more with every position."""
    return 1.0 + 0.1 * inputs.position_ids_BT


class Uneven(FromTeacher):
    """A figure that some ranks do not report."""

    def __init__(self, teacher: Teacher, rank: int) -> None:
        super().__init__(teacher)
        self._rank = rank

    def losses(
        self, batch: Batch, student: Prediction, taught: Taught, counts: Counts
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        zero = student.hidden_BTD[:0].sum()
        return zero, {} if self._rank == 0 else {"a_figure": zero.detach()}
