"""A change of a batch's pictures before both models: the protocol, and the door behind which one stands.

Shape legend: I images, N tokens of an image or response targets, E tower width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from llava_kd.batch import Batch, Counts
from llava_kd.distill.taught import Taught
from llava_kd.distill.teaching.from_teacher import FromTeacher, Predicts
from llava_kd.distill.teaching.switch import Switch
from llava_kd.losses.head_loss import head_loss
from llava_kd.losses.reference import HeadLoss
from llava_kd.models.mllm import Prediction


class PictureChange(nn.Module):
    """What a method does to the pictures. `forward` gives the batch as the student and its teacher read it.

    Its buffers are its state: saved, taken back when a run goes on, and the same on every rank. `steps_done`
    is one of them, so that what is drawn depends on the seed and the step.
    """

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self._read = (-1, 0)

    @property
    def steps_done(self) -> int:
        """Read from the device once a step, not once a micro-batch."""
        if self._read[0] != self.steps._version:
            self._read = (self.steps._version, int(self.steps))
        return self._read[1]

    def forward(self, batch: Batch) -> Batch:
        """With other pixels on both sides, and all else as it was."""
        raise NotImplementedError

    def label_weight(self, batch: Batch) -> Tensor | None:
        """[N]: what the label of each of `batch.student.places.response_N` counts; None is 1 for all."""
        del batch
        return None

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """Denominators of its own, summed over the whole step before the first forward."""
        del batch
        return {}

    def figures(
        self, batch: Batch, student: Prediction, taught: Taught, counts: Counts
    ) -> Mapping[str, Tensor]:
        """Shares of this micro-batch in what is logged, after its forward; what learns, learns here.

        Asked with gradient, once a micro-batch, and the names are the same at every call.
        """
        del batch, student, taught, counts
        return {}

    def after_step(self, means: Mapping[str, Tensor]) -> None:
        """The step's global means, once its weights have moved; the state moves here and nowhere else."""
        del means
        self.steps += 1


class ChangedPictures(FromTeacher):
    """A teacher that is live and sees what the student sees, whatever was done to it."""

    changes_pictures = True

    def __init__(
        self,
        name: str,
        change: PictureChange,
        predict: Predicts,
        switch: Switch | None = None,
        *,
        head_loss: Callable[..., HeadLoss] = head_loss,
    ) -> None:
        """`name` is that of the state in a checkpoint, which a run with another change does not take."""
        super().__init__(predict, switch, head_loss=head_loss)
        self._name, self._change = name, change

    def modules(self) -> nn.Module:
        return nn.ModuleDict({self._name: self._change})

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        return self._change.counts(batch)

    def outside(self, batch: Batch, features_INE: Tensor | None) -> Taught:
        return Taught()

    def pictures(self, batch: Batch) -> Batch:
        with torch.no_grad():
            return self._change(batch)

    def inside(self, batch: Batch, student: Prediction, features_INE: Tensor, taught: Taught) -> Taught:
        # As where it predicts outside: without gradient, and in its own type.
        with torch.no_grad(), torch.autocast(student.hidden_BTD.device.type, enabled=False):
            prediction = self.predict(batch, features_INE.detach())
        weight_N = self._change.label_weight(batch)
        taught = replace(taught, prediction=prediction, label_weight_N=weight_N)
        return super().inside(batch, student, features_INE, taught)

    def losses(
        self, batch: Batch, student: Prediction, taught: Taught, counts: Counts
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        zero = torch.zeros((), device=student.hidden_BTD.device)
        return zero, self._change.figures(batch, student, taught, counts)

    def figures(self, batch: Batch, taught: Taught, counts: Counts) -> Mapping[str, Tensor]:
        """The teacher's own, of the pictures as they are: one more pass of it."""
        unchanged = replace(taught, prediction=self.predict(batch, None))
        return super().figures(batch, unchanged, counts)

    def after_step(self, means: Mapping[str, Tensor]) -> None:
        self._change.after_step(means)
