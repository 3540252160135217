"""What a teacher says of a micro-batch, however it came to say it.

Shape legend: B rows, T tokens, N selected rows, P places of the flattened rows, K stored columns, M teachers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from llava_kd.distill.token_policy import PolicyRows
from llava_kd.losses.reference_top_k import TopK
from llava_kd.losses.targets.mixture import MixedTarget, Voice
from llava_kd.models.mllm import Prediction


@dataclass(frozen=True, kw_only=True)
class TopKPrediction:
    """The largest logits of each place, their columns, and the log of what the others' exp(z / T) sum to.

    `std_BT`, at the temperature `std` alone: T, the standard deviation of all the logits of a place.
    """

    logits_BTK: Tensor
    columns_BTK: Tensor
    rest_BT: Tensor
    std_BT: Tensor | None = None

    def top_k(self, rows_N: Tensor) -> TopK:
        """Of these flat places."""
        return TopK(
            logits_NK=self.logits_BTK.flatten(0, 1)[rows_N],
            columns_NK=self.columns_BTK.flatten(0, 1)[rows_N],
            rest_N=self.rest_BT.flatten()[rows_N],
            std_N=None if self.std_BT is None else self.std_BT.flatten()[rows_N],
        )


@dataclass(frozen=True, kw_only=True)
class MixedPrediction:
    """What several teachers say of the same tokens, and the log of each one's weight at each flat place."""

    parts: tuple[Prediction, ...]
    log_weights_PM: Tensor

    def target(
        self, rows_N: Tensor, *, temperature: float = 1.0, num_common: int | None = None
    ) -> MixedTarget:
        """Of these flat places: what the first teacher's logits become; over the columns that all have."""
        return MixedTarget(
            others=tuple(
                Voice(one.hidden_BTD.flatten(0, 1)[rows_N], one.head_VD, one.bias_V) for one in self.parts[1:]
            ),
            log_weights_NM=self.log_weights_PM[rows_N],
            temperature=temperature,
            num_common=num_common or min(len(one.head_VD) for one in self.parts),
        )


@dataclass(frozen=True, kw_only=True)
class Dependency:
    """Of each response row: how much the teacher needs the picture there, in nats, and what its divergence is
    multiplied by. `drops_rows`: some of these may be 0.
    """

    score_N: Tensor
    weight_N: Tensor
    drops_rows: bool = False


# What cross-entropy is divided by where some labels do not count: what is left of the response targets.
LABELLED = "labelled_tokens"

AnyPrediction = Prediction | TopKPrediction | MixedPrediction


@dataclass(frozen=True, kw_only=True)
class Taught:
    """What the terms compare the student with.

    `prediction` is on the teacher's side of the batch. `switched` is the teacher's over the student's visual
    output. `others` are further ones by name, such as on other pixels, for the terms that ask for them.
    `policy`: what of it is taught at tokens that may be private.
    `label_weight_N`: [response targets of the student's side], what the label of each counts in
    cross-entropy; None is 1 for all. Whoever gives it counts LABELLED, of every batch.
    `dependency`: of the same targets, what the divergence of each counts; None is 1 for all.
    """

    prediction: AnyPrediction | None = None
    switched: Prediction | None = None
    others: Mapping[str, AnyPrediction] = field(default_factory=dict)
    policy: PolicyRows | None = None
    label_weight_N: Tensor | None = None
    dependency: Dependency | None = None
