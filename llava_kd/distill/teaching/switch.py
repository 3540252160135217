"""The teacher's language path over the student's visual output.

Shape legend: I images, M and N visual tokens of an image on the teacher's and the student's side, D student
width, E width of the teacher or of its tower.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llava_kd.batch import Batch
from llava_kd.models.mllm import MLLM, Prediction


@dataclass(frozen=True, kw_only=True)
class Switch:
    """The teacher's language path over the student's visual output; gradient flows through it to the student.

    `source`: `tower` sends the student's features through the teacher's projector (Switch-KD); `projector`
    sends the student's projected features through `width_map_DE` into the teacher's embedding space. `align`
    carries [I, M, width] from the student's grid to the teacher's, None where both have the same.
    """

    teacher: MLLM
    source: Literal["tower", "projector"] = "tower"
    align: Callable[[Tensor], Tensor] | None = None
    width_map_DE: Tensor | None = None

    def __call__(self, batch: Batch, student: Prediction, features_INE: Tensor) -> Prediction:
        inputs = batch.teacher_inputs
        weight = self.teacher.language_model.get_input_embeddings().weight
        # As the teacher itself is run, so that equal visual output gives equal logits.
        with torch.autocast(weight.device.type, enabled=False):
            visual_INE = features_INE if self.source == "tower" else student.projected_IND
            visual_INE = visual_INE if self.align is None else self.align(visual_INE)
            if self.width_map_DE is None:
                visual_INE = self.teacher.project(visual_INE.to(weight.dtype))
            else:
                visual_INE = visual_INE.to(self.width_map_DE.dtype) @ self.width_map_DE
            return self.teacher.read(inputs, visual_INE.to(weight.dtype))
