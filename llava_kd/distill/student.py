"""The module that an engine wraps: student forward, head and losses in one `forward`.

Shape legend: I images, N tokens of an image, E tower width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from llava_kd.batch import Batch, Counts
from llava_kd.distill.diagnosis import Diagnosis
from llava_kd.distill.objective import Losses, Objective
from llava_kd.distill.taught import Taught
from llava_kd.distill.teaching.door import Teaching
from llava_kd.models.mllm import MLLM

Step = tuple[Tensor, dict[str, Tensor]]
BUFFER = "buffer/teaching."
LEARNED_WEIGHTS = "learned_weights."  # how the names of their parameters begin


class Student(nn.Module):
    """Losses of one micro-batch. `forward` uses the head, since there sharded engines have gathered it."""

    def __init__(self, mllm: MLLM, objective: Objective, teaching: Teaching | None = None) -> None:
        """`teaching` is no child, so a frozen teacher is not in the tree; what it has trained is one."""
        super().__init__()
        self.mllm = mllm
        self.objective = objective
        self._door = (teaching or Teaching(),)  # in a tuple, so that nn.Module does not register it
        self.teaching = self._door[0].modules()
        if objective.modules:  # weights that terms bring are trained, sharded and saved with the student's
            self.terms = nn.ModuleDict(objective.modules)
        if objective.learned is not None:
            self.learned_weights = objective.learned

    def counts(self, batch: Batch) -> Counts:
        """Of this micro-batch: what the terms are divided by, and what the teaching adds."""
        return Counts({**self.objective.counts(batch), **self._door[0].counts(batch)})

    def losses(
        self,
        call: Callable[..., Step],
        batch: Batch,
        counts: Counts,
        *,
        is_logged: bool = False,
        diagnosis: Diagnosis | None = None,
    ) -> Step:
        """Loss and means of one micro-batch, with the teacher's own figures where the step is logged.

        `call` is this module's `forward` as the engine wraps it; what needs no gradient is done before. What
        `diagnosis` asks, where there is one, is added to it.
        """
        door = self._door[0]
        runs_inside = self.mllm.train_tower or door.changes_pictures
        features_INE = None if runs_inside else self.mllm.image_features(batch.student)
        with torch.no_grad():
            taught = door.outside(batch, features_INE)
        loss, means = call(batch, counts, features_INE, taught, diagnosis=diagnosis)
        if is_logged:
            with torch.no_grad():
                means = {**means, **door.figures(batch, taught, counts)}
        return loss, means

    def forward(
        self,
        batch: Batch,
        counts: Counts,
        features_INE: Tensor | None = None,
        taught: Taught | None = None,
        objective: Objective | None = None,
        diagnosis: Diagnosis | None = None,
    ) -> Step:
        """Loss and logged means. `features_INE` is None where the tower runs here, as one that is trained.

        `objective`: another than that of training, which reads the student alone. `diagnosis` looks on.
        """
        door = self._door[0] if objective is None else Teaching()
        if door.changes_pictures:
            batch, features_INE = door.pictures(batch), None
        if features_INE is None:
            features_INE = self.mllm.image_features(batch.student)
        prediction = self.mllm(batch.student, features_INE)
        taught = door.inside(batch, prediction, features_INE, taught or Taught())
        losses: Losses = (objective or self.objective)(prediction, taught, batch, counts)
        if diagnosis is not None:
            diagnosis.look(prediction, taught, batch, counts)
        if (own := door.losses(batch, prediction, taught, counts)) is None:
            return losses.loss, losses.means
        return losses.loss + own[0], {**losses.means, **own[1]}

    def after_step(self, means: Mapping[str, Tensor]) -> None:
        """Once the weights have moved: what of the teaching moves without an optimiser, moves now."""
        self._door[0].after_step(means)

    def advice(self, means: Mapping[str, Tensor]) -> str | None:
        """What the teacher would tell the user after a step with these global means."""
        return self._door[0].advice(means)

    def state(self) -> dict[str, Tensor]:
        """What of the teaching changes without an optimiser, whole, under names that no engine uses."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self._buffers_of_teaching().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take what `state` gave; the others, which are the engine's. ValueError for another teaching's."""
        own = self._buffers_of_teaching()
        there = {name for name in state if name.startswith(BUFFER)}
        if different := sorted(there ^ own.keys()):
            raise ValueError(
                f"the checkpoint and this run must hold the same state of the teaching; only one has "
                f"{different[0]!r}. Resume with the same teaching, or start in a new output_dir"
            )
        for name, tensor in own.items():
            tensor.copy_(state[name])
        return {name: tensor for name, tensor in state.items() if name not in there}

    def _buffers_of_teaching(self) -> dict[str, Tensor]:
        """Those that are saved, the same on every rank."""
        if self.teaching is None:
            return {}
        saved = self.teaching.state_dict()
        return {f"{BUFFER}{name}": t for name, t in self.teaching.named_buffers() if name in saved}
