"""What a teacher says of a micro-batch, however it came to say it.

Shape legend: B rows, T tokens, N selected rows, P places of the flattened rows, K stored columns, M teachers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llava_kd.distill.token_policy import PolicyRows
from llava_kd.losses.divergence import Divergence, Temperature
from llava_kd.losses.reference_top_k import TopK
from llava_kd.losses.targets.contrast import ContrastTarget
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
                Voice(one.hidden_BTD.flatten(0, 1)[rows_N], one.head_VD, one.bias_V, one.cap)
                for one in self.parts[1:]
            ),
            log_weights_NM=self.log_weights_PM[rows_N],
            temperature=temperature,
            num_common=num_common or min(len(one.head_VD) for one in self.parts),
        )


@dataclass(frozen=True, kw_only=True)
class Dependency:
    """Of each response row: how much the teacher needs the picture there, in nats, and what its divergence is
    multiplied by. `drops_rows`: some of these may be 0.

    `gamma` above 0: how much a further target counts where `is_shown_N`, made of what teacher and student say
    without the picture, `unseen` and `own` at these rows.
    """

    score_N: Tensor
    weight_N: Tensor
    is_shown_N: Tensor
    unseen: Voice | None = None
    own: Voice | None = None
    gamma: float = 0.0
    drops_rows: bool = False

    @property
    def factor_N(self) -> Tensor:
        """Of both targets together."""
        return self.weight_N * (1 + self.gamma * self.is_shown_N)

    def target(
        self, kind: tuple[Temperature, Divergence], starts: tuple[int, ...], num_rows: int, num_common: int
    ) -> ContrastTarget | None:
        """The teacher's change, for a call of `num_rows` rows in which the response rows begin at `starts`.

        None without a further target. ValueError for a divergence or temperature that it is not made for.
        """
        if self.gamma == 0 or not starts:
            return None
        temperature, divergence = kind
        if (
            isinstance(temperature, str)
            or divergence.kind not in ("forward", "reverse")
            or self.unseen is None
            or self.own is None
        ):
            raise ValueError(
                "a further target needs the student's own reading and the teacher's without the picture, a "
                "number as temperature and the "
                f"divergence `forward` or `reverse`; got {temperature}, {divergence.kind}"
            )
        number_N = torch.arange(len(self.is_shown_N), device=self.is_shown_N.device)
        row_N = number_N.new_full((num_rows,), -1)
        for start in starts:
            row_N[start : start + len(number_N)] = torch.where(self.is_shown_N, number_N, -1)
        return ContrastTarget(
            unseen=self.unseen,
            own=self.own,
            row_N=row_N,
            gamma=self.gamma,
            kind=divergence.kind,
            temperature=temperature,
            num_common=num_common,
        )


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
