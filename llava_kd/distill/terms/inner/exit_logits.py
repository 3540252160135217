"""Early exits of the student's language model, each matched to the teacher's output.

An exit is a norm, a small residual adapter, a norm, and the student's own head without a gradient: what the
exits teach goes into the layers before them, where the head of an exit's own would be a vocabulary of weights
that learns it in their place and is thrown away, and no exit pulls the head from what the last layer needs.

Shape legend: N rows, D and E width of student and teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Interval, MinLen
from torch import Tensor, nn
from torch.nn.functional import gelu
from typing_extensions import Doc

from llava_kd.distill.rows import Place
from llava_kd.distill.terms.inner.pairs import width_of
from llava_kd.distill.terms.seen import Seen
from llava_kd.distill.terms.term import VISUAL_TOKENS, Denominator, Reads, Term, Widths
from llava_kd.losses.inner.exits import Form, enhanced


class Exit(nn.Module):
    """From states of a layer to what the head reads; at first the states themselves, normed."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.down = nn.Linear(width, inner)
        self.up = nn.Linear(inner, width)
        self.final_norm = nn.RMSNorm(width, eps=1e-6)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, states_ND: Tensor) -> Tensor:
        states_ND = states_ND.to(self.down.weight.dtype)
        states_ND = states_ND + self.up(gelu(self.down(self.norm(states_ND))))
        return self.final_norm(states_ND)


@dataclass(frozen=True, kw_only=True)
class ExitLogits(Term):
    layers: Annotated[
        tuple[Annotated[int, Ge(0)], ...],
        MinLen(1),
        Doc("Decoder layers of the student, from 0, with an exit behind each; their losses are added."),
    ] = (0,)
    gamma: Annotated[
        float, Interval(gt=0, le=4), Doc("Above 1, the label counts for more where the teacher is sure.")
    ] = 1.0
    form: Annotated[
        Form, Doc("The loss of the `paper`, or of its `code`, which weakens all but the label too.")
    ] = "paper"
    width: Annotated[int, Gt(0), Doc("Of the adapter of an exit.")] = 128

    label: ClassVar[str] = "response tokens at early exits of the student, against the teacher's output"
    paper: ClassVar[str] = "One-for-All, arXiv 2310.19444"
    place: ClassVar[Place] = "response"

    def __post_init__(self) -> None:
        if len(set(self.layers)) < len(self.layers):
            raise ValueError(f"`layers` of exits must differ; got {', '.join(map(str, self.layers))}")

    @property
    def _taps(self) -> tuple[str, ...]:
        return tuple(f"language_model.layers.{layer}" for layer in self.layers)

    @property
    def reads(self) -> Reads:
        return Reads(
            teacher="states",
            places=(self.place,),
            vocabulary=True,
            grids=self.place == "visual",
            student_taps=self._taps,
            labels=self.place == "response",
        )

    def module(self, widths: Widths) -> nn.Module:
        for tap in self._taps:
            if (width := width_of(tap, widths.student_taps)) != widths.student:
                raise ValueError(
                    f"{tap} of the student is {width} wide and its head reads {widths.student}: no exit fits"
                )
        return nn.ModuleList(Exit(widths.student, self.width) for _ in self._taps)

    def total(self, seen: Seen) -> Tensor:
        exits = seen.module
        assert isinstance(exits, nn.ModuleList)
        student, teacher = seen.heads()
        teacher_NE, targets_N = seen.teacher_rows(self.place), seen.targets(self.place)
        asked = enhanced(
            teacher_NE,
            teacher.head_VD,
            targets_N,
            gamma=self.gamma,
            form=self.form,
            bias_U=teacher.bias_V,
            num_common=seen.num_common,
        )
        bias_U = None if teacher.bias_V is None else asked.sharpness * teacher.bias_V
        total = []
        for exit_, tap in zip(exits, self._taps, strict=True):
            result = seen.formulas.head_loss(
                exit_(seen.tapped_rows(self.place, tap)),
                student.head_VD.detach(),
                targets_N,
                ce_weight_N=asked.ce_weight_N,
                kl_weight_N=asked.kl_weight_N,
                student_bias_V=None if student.bias_V is None else student.bias_V.detach(),
                teacher_NE=asked.sharpness * teacher_NE,
                teacher_head_UE=teacher.head_VD,
                teacher_bias_U=bias_U,
                num_common=seen.num_common,
                active_rows=(len(targets_N), 0),
            )
            total.append(result.loss)
        return torch.stack(total).sum()


@dataclass(frozen=True, kw_only=True)
class VisualExitLogits(ExitLogits):
    label: ClassVar[str] = "visual tokens at early exits of the student, against the teacher's output"
    denominator: ClassVar[Denominator] = VISUAL_TOKENS
    place: ClassVar[Place] = "visual"
