"""What a step is taught: the teacher's prediction, and what else it says of the micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

from llava_kd.distill.teaching.cached import TopKPrediction
from llava_kd.models.mllm import Prediction

AnyPrediction = Prediction | TopKPrediction


@dataclass(frozen=True, kw_only=True)
class Taught:
    """`switched` is the teacher's prediction over the student's visual output."""

    prediction: AnyPrediction | None = None
    switched: Prediction | None = None
