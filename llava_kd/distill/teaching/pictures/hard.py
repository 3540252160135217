"""Learned changes of pictures on which student and teacher disagree while the teacher keeps its answer.

HARD, arXiv 2305.14890: the student learns min D(f_T(a(x)), f_S(a(x))), the augmentor a

    max lambda_S D(f_T(a(x)), f_S(a(x))) - lambda_T D(f_T(x), f_T(a(x)))

in turns: the augmentor until the disagreement reaches `upper`, then the student until it has come down to
`lower`. Here D is that of the objective's response_kl, a mean over the response targets of records whose
pictures may be changed. In the augmentor's phase the student goes on with the pictures as they are, because
every optimiser step is one of its schedule.

Shape legend: I images, C channels, H height, W width, R records, N response targets, Z noise of a record, K
numbers of a change, P weights of the augmentor.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llava_kd.batch import Batch, Counts, Inputs
from llava_kd.distill.rows import Rows
from llava_kd.distill.taught import Taught
from llava_kd.distill.teaching.live import Teacher
from llava_kd.distill.teaching.pictures.augmentor import NOISE, Augmentor, next_phase
from llava_kd.distill.teaching.pictures.change import PictureChange
from llava_kd.distill.teaching.pictures.compared import Compared
from llava_kd.distill.teaching.pictures.draws import (
    check_ids,
    normal_of_records,
    records_at,
    records_of_images,
)
from llava_kd.distill.teaching.pictures.warps import Pixels, Warps
from llava_kd.models.mllm import MLLM, Prediction

Show = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True, kw_only=True)
class Pace:
    """`student` and `teacher` are lambda_S and lambda_T; the thresholds are in nats a token."""

    student: float = 1.0
    teacher: float = 1.0
    lower: float = 0.1
    upper: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.lower < self.upper:
            raise ValueError(
                f"the lower threshold must not be negative and must lie below the upper one; got "
                f"lower={self.lower}, upper={self.upper}"
            )


@dataclass(frozen=True, kw_only=True)
class Room:
    """What the change meets around it.

    `pixels` of the student's side and the teacher's; `kept`: ids of records whose pictures stay as they are;
    `total` sums over ranks; `show` is given a step, pixels [I, C, H, W] and what they became, where it is
    one of every `show_every`.
    """

    pixels: tuple[Pixels, Pixels]
    kept: Collection[str] = frozenset()
    total: Callable[[Tensor], Tensor] = lambda values: values
    show: Show | None = None
    show_every: int = 0


class Hard(PictureChange):
    """Its state: the augmentor with its optimiser, whose turn it is, and how many steps were done."""

    is_learning: Tensor

    def __init__(
        self,
        models: tuple[MLLM, Teacher],
        warps: Warps,
        compared: Compared,
        room: Room,
        *,
        pace: Pace | None = None,
        lr: float = 1e-2,
        seed: int = 0,
    ) -> None:
        """`models`: the student, which an engine leaves whole, and its teacher; neither becomes a child."""
        super().__init__()
        self._models, self._room = models, room
        self._warps, self._compared, self._pace = warps, compared, pace or Pace()
        self._seed = seed
        self.augmentor = Augmentor(lr=lr, seed=seed)
        self.register_buffer("is_learning", torch.ones((), dtype=torch.long))
        self._phase = (-1, True)
        self._gradient_P: Tensor | None = None  # of the step so far, on this rank
        self._shown = -1

    @property
    def learns(self) -> bool:
        """Whether this step is the augmentor's; read from the device once a step."""
        if self._phase[0] != self.is_learning._version:
            self._phase = (self.is_learning._version, bool(self.is_learning))
        return self._phase[1]

    def forward(self, batch: Batch) -> Batch:
        return batch if self.learns else self.changed(batch)

    def changed(self, batch: Batch, weights_P: Tensor | None = None) -> Batch:
        """The batch with changed pictures; gradient flows to `weights_P`, a leaf of the augmentor."""
        inputs = batch.student
        if inputs.num_images == 0:
            return batch
        record_I = records_of_images(inputs)
        noise_IZ = normal_of_records(batch, self._seed, self.steps_done, NOISE)[record_I]
        numbers_IK = self.augmentor(inputs.pixels_ICHW, noise_IZ, weights_P)
        may_I111 = self._may_change(batch)[record_I].view(-1, 1, 1, 1)

        def warped(side: Inputs, pixels: Pixels) -> Inputs:
            changed_ICHW = self._warps(side.pixels_ICHW, numbers_IK, pixels)
            return replace(side, pixels_ICHW=torch.where(may_I111, changed_ICHW, side.pixels_ICHW))

        teacher = None if batch.teacher is None else warped(batch.teacher, self._room.pixels[1])
        result = replace(batch, student=warped(inputs, self._room.pixels[0]), teacher=teacher)
        self._show(inputs.pixels_ICHW, result.student.pixels_ICHW)
        return result

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        return {"changed_tokens": self._is_changed(batch, batch.student.places.response_N).sum().double()}

    def figures(
        self, batch: Batch, student: Prediction, taught: Taught, counts: Counts
    ) -> Mapping[str, Tensor]:
        """`hard_disagreement` and `hard_consistency` are D(f_T(a(x)), f_S(a(x))) and D(f_T(x), f_T(a(x))),
        the latter 0 in the student's phase, where nobody asks for it; `hard_learning` is 1 in the
        augmentor's; `hard_changed` is the share of response targets whose pictures may be changed.
        """
        rows = Rows.select("response", batch, with_teacher=True)
        of_step = counts["changed_tokens"].clamp_min(1)
        is_changed_N = self._is_changed(batch, rows.student_N)
        weight_N = (is_changed_N / of_step).float() * rows.is_shared_N
        here = is_changed_N.sum()
        assert isinstance(taught.prediction, Prediction)
        if self.learns:
            apart, strayed = self._learn(batch, taught.prediction, rows, weight_N)
        else:
            with torch.no_grad():
                pair = (student, rows.student_N), (taught.prediction, rows.teacher_N)
                apart, strayed = self._compared(*pair, weight_N), torch.zeros_like(here)
        return {
            "hard_disagreement": apart.detach(),
            "hard_consistency": strayed.detach(),
            "hard_learning": here / of_step if self.learns else torch.zeros_like(here),
            "hard_changed": here / counts["response_tokens"].clamp_min(1),
        }

    def after_step(self, means: Mapping[str, Tensor]) -> None:
        if not bool(torch.isfinite(means["loss"])):
            return  # the trainer stops for it, and names the records
        if self.learns:
            gradient_P = self._gradient_P
            gradient_P = torch.zeros_like(self.augmentor.weights_P) if gradient_P is None else gradient_P
            self.augmentor.ascend(self._room.total(gradient_P))
        self._gradient_P = None
        if bool(means["hard_changed"] > 0):  # a step without pictures says nothing
            apart = float(means["hard_disagreement"])
            pace = self._pace
            learns = next_phase(learns=self.learns, disagreement=apart, lower=pace.lower, upper=pace.upper)
            self.is_learning.fill_(int(learns))
        super().after_step(means)

    def _learn(self, batch: Batch, before: Prediction, rows: Rows, weight_N: Tensor) -> tuple[Tensor, Tensor]:
        """Add this micro-batch to the gradient of the step; what both divergences are."""
        zero = torch.zeros((), device=weight_N.device)
        if batch.student.num_images == 0 or len(rows.student_N) == 0:
            return zero, zero
        weights_P = self.augmentor.leaf()
        changed = self.changed(batch, weights_P)
        student, teacher = self._models
        features_INE = student.image_features(changed.student)
        said = student(changed.student, features_INE)
        truth = teacher.with_gradient(changed, features_INE)
        apart = self._compared((said, rows.student_N), (truth, rows.teacher_N), weight_N)
        strayed = self._compared((truth, rows.teacher_N), (before, rows.teacher_N), weight_N)
        reached = self._pace.student * apart - self._pace.teacher * strayed
        (gradient_P,) = torch.autograd.grad(reached, weights_P)
        self._gradient_P = gradient_P if self._gradient_P is None else self._gradient_P + gradient_P
        return apart, strayed

    def _may_change(self, batch: Batch) -> Tensor:
        """[R] whether the pictures of each record may be changed."""
        check_ids(batch)
        may = torch.tensor([name not in self._room.kept for name in batch.record_ids])
        return may.to(batch.student.pixels_ICHW.device, non_blocking=True)

    def _is_changed(self, batch: Batch, places_N: Tensor) -> Tensor:
        """[N], 1 for the places of records that have a picture which may be changed."""
        inputs = batch.student
        if inputs.num_images == 0:
            return torch.zeros(len(places_N), device=places_N.device)
        may_R = self._may_change(batch)
        has_R = torch.zeros_like(may_R).index_fill(0, records_of_images(inputs), value=True)
        return (may_R & has_R).float()[records_at(inputs, places_N)]

    def _show(self, before_ICHW: Tensor, after_ICHW: Tensor) -> None:
        """The first pictures of a step, where it is one that is shown."""
        room, step = self._room, self.steps_done + 1
        if room.show is None or room.show_every == 0 or step % room.show_every or self._shown == step:
            return
        self._shown = step
        room.show(step, before_ICHW.detach(), after_ICHW.detach())
