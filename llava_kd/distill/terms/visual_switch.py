"""Differences of logits between the teacher and its own language path over the student's visual output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from torch import Tensor
from typing_extensions import Doc

from llava_kd.distill.terms.dbild import DBiLD
from llava_kd.distill.terms.seen import Seen
from llava_kd.distill.terms.term import Reads


@dataclass(frozen=True, kw_only=True)
class VisualSwitch(DBiLD):
    source: Annotated[
        Literal["tower", "projector"],
        Doc("The student's `tower` to the teacher's projector; or `projector`, by a map of embeddings."),
    ] = "tower"

    label: ClassVar[str] = "what the teacher predicts from the student's visual tokens; nats a token"

    @property
    def reads(self) -> Reads:
        return Reads(
            teacher="model",
            places=("response",),
            vocabulary=True,
            switched=self.source,
            before_decoder=True,
        )

    def total(self, seen: Seen) -> Tensor:
        _, teacher = seen.heads()
        return self.difference(seen, seen.switched_states("response"), (teacher, teacher))

    def fits(self, trainable: Sequence[str], placement: str) -> None:
        if self.source == "tower" and "vision_tower" not in trainable:
            raise ValueError(
                "`objective.visual_switch.source` is tower, but the tower is frozen and the term constant; "
                "add vision_tower to `trainable`, or set source to projector"
            )
        if not {"vision_tower", "multi_modal_projector"} & set(trainable):
            raise ValueError(
                "`objective.visual_switch.source` is projector, but neither projector nor tower is trained "
                "and the term constant; add multi_modal_projector to `trainable`, or remove the term"
            )
        if placement != "replicated":
            raise ValueError(
                "`objective.visual_switch` runs backwards through the teacher, which must be whole on every "
                "rank; set teacher.placement to replicated"
            )
