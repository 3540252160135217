"""A second student that learns beside the first: at each step either is the other's frozen teacher.

The student's terms stand in the objective as with any teacher. The peer's are the same terms with the two
models exchanged, on the batch with its sides exchanged. Neither loss has a gradient to the model that teaches
in it, so that both can be moved at once.

Shape legend: I images, N tokens of an image, E tower width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from llava_kd.batch import Batch, Counts
from llava_kd.distill.objective import Objective
from llava_kd.distill.taught import Taught
from llava_kd.distill.teaching.door import Teaching
from llava_kd.models.mllm import MLLM, Prediction

PEER = "peer/"  # how the names of its figures and of its counts begin


class PeerModel(nn.Module):
    """What trains of a peer: its model, and the weights that its terms bring."""

    def __init__(self, mllm: MLLM, objective: Objective) -> None:
        super().__init__()
        self.mllm = mllm
        self.objective = objective
        if objective.modules:
            self.terms = nn.ModuleDict(objective.modules)


class Peer(Teaching):
    """Reads the teacher's side of a batch; runs and learns within the student's forward."""

    def __init__(self, mllm: MLLM, objective: Objective, *, shares_tower: bool = False) -> None:
        """`objective` is the peer's own, its `student` the peer. `shares_tower`: as of a `Teacher`."""
        self._model = PeerModel(mllm, objective)
        self._shares_tower = shares_tower

    def modules(self) -> PeerModel:
        return self._model

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """What the peer's terms are divided by: of its own visual tokens there may be other numbers."""
        counted = self._model.objective.counts(exchanged(batch))
        return {f"{PEER}{name}": value for name, value in counted.items()}

    def inside(self, batch: Batch, student: Prediction, features_INE: Tensor, taught: Taught) -> Taught:
        mllm, inputs = self._model.mllm, batch.teacher_inputs
        if not self._shares_tower:
            # A frozen tower computes in its own type, as it does outside the forward.
            cast = torch.autocast(features_INE.device.type, enabled=False)
            with contextlib.nullcontext() if mllm.train_tower else cast:
                features_INE = mllm.image_features(inputs)
        peer = mllm(inputs, features_INE)
        return replace(taught, prediction=peer.detached(), others={PEER: peer})

    def losses(
        self, batch: Batch, student: Prediction, taught: Taught, counts: Counts
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        peer = taught.others[PEER]
        assert isinstance(peer, Prediction)
        own = Counts({n.removeprefix(PEER): value for n, value in counts.items() if n.startswith(PEER)})
        found = self._model.objective(peer, Taught(prediction=student.detached()), exchanged(batch), own)
        return found.loss, {f"{PEER}{name}": value for name, value in found.means.items()}


def exchanged(batch: Batch) -> Batch:
    """The same records, read by the teacher's side as the student."""
    if batch.teacher is None:
        return batch
    return replace(batch, student=batch.teacher, teacher=batch.student)
