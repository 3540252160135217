"""The module that an engine wraps: student forward, head and losses in one `forward`.

Shape legend: I images, N tokens of an image, E tower width.
"""

from __future__ import annotations

from torch import Tensor, nn

from llava_kd.batch import Batch, Counts
from llava_kd.distill.objective import Losses, Objective
from llava_kd.distill.options import Switch
from llava_kd.distill.teaching.taught import AnyPrediction, Taught
from llava_kd.models.mllm import MLLM


class Student(nn.Module):
    """Losses of one micro-batch. `forward` uses the head, since there sharded engines have gathered it."""

    def __init__(self, mllm: MLLM, objective: Objective, switch: Switch | None = None) -> None:
        """`switch` holds the frozen teacher, which is no child: it is not a module."""
        super().__init__()
        self.mllm = mllm
        self.objective = objective
        self.switch = switch
        if objective.modules:  # weights that terms bring are trained, sharded and saved with the student's
            self.terms = nn.ModuleDict(objective.modules)

    def forward(
        self,
        batch: Batch,
        counts: Counts,
        features_INE: Tensor | None = None,
        teacher: AnyPrediction | None = None,
        objective: Objective | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and logged means. `features_INE` is None where the tower is trained, and runs here.

        `objective`: another than that of training, which reads the student alone.
        """
        if features_INE is None:
            features_INE = self.mllm.image_features(batch.student)
        prediction = self.mllm(batch.student, features_INE)
        switched = None
        if self.switch is not None and objective is None:
            switched = self.switch(batch, prediction, features_INE)
        taught = Taught(prediction=teacher, switched=switched)
        losses: Losses = (objective or self.objective)(prediction, taught, batch, counts)
        return losses.loss, losses.means
