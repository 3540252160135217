"""Early exits of the student's language model and of its vision tower, each matched to the teacher's output.

An exit is a norm, a small residual adapter, a norm, and the student's own head without a gradient: what the
exits teach goes into the layers before them, where the head of an exit's own would be a vocabulary of weights
that learns it in their place and is thrown away, and no exit pulls the head from what the last layer needs.

A stage of a tower is a map of another size and width. At visual tokens the exit reads the map, pooled onto
their grid. At answers, where a tower has no rows, it reads the mean of the map, as a classifier's exit does,
and, since a tower sees no question, the words before the row: their mean and the last of them, as embedded.

Shape legend: N rows, D and E width of student and teacher, C width of a stage, X of the words before a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor, nn
from torch.nn.functional import gelu
from typing_extensions import Doc

from llava_kd.distill.rows import Place
from llava_kd.distill.terms.inner.pairs import width_of
from llava_kd.distill.terms.seen import Seen
from llava_kd.distill.terms.term import VISUAL_TOKENS, Denominator, Reads, Term, Widths
from llava_kd.losses.inner.exits import Form, enhanced
from llava_kd.models.towers.stages import STAGE

WORDS = "language_model.embed_tokens"


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


class StageExit(nn.Module):
    """From a stage's states, and the words before a row where there are any, to what the head reads."""

    def __init__(self, stage: int, words: int, inner: int, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(stage, eps=1e-6)
        self.norm_of_words = nn.RMSNorm(words, eps=1e-6) if words else None
        self.down = nn.Linear(stage + words, inner)
        self.up = nn.Linear(inner, width)
        self.final_norm = nn.RMSNorm(width, eps=1e-6)

    def forward(self, states_NC: Tensor, words_NX: Tensor | None = None) -> Tensor:
        read_NC = self.norm(states_NC.to(self.down.weight.dtype))
        if self.norm_of_words is not None:
            assert words_NX is not None
            read_NC = torch.cat([read_NC, self.norm_of_words(words_NX.to(self.down.weight.dtype))], dim=1)
        return self.final_norm(self.up(gelu(self.down(read_NC))))


@dataclass(frozen=True, kw_only=True)
class ExitLogits(Term):
    layers: Annotated[
        tuple[Annotated[int, Ge(0)], ...],
        Doc("Decoder layers of the student, from 0, with an exit after each; their losses are added."),
    ] = (0,)
    stages: Annotated[
        tuple[Annotated[int, Ge(0)], ...],
        Doc(
            "Hidden states of the student's trained tower, from 0, such as a ConvNet's stages, also with "
            "exits."
        ),
    ] = ()
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
        for name, places in (("layers", self.layers), ("stages", self.stages)):
            if len(set(places)) < len(places):
                raise ValueError(f"`{name}` of exits must differ; got {', '.join(map(str, places))}")
        if not (self.layers or self.stages):
            raise ValueError(
                "exits are placed after `layers` or `stages`, and both are empty; name at least one"
            )

    @property
    def _layer_taps(self) -> tuple[str, ...]:
        return tuple(f"language_model.layers.{layer}" for layer in self.layers)

    @property
    def _stage_taps(self) -> tuple[str, ...]:
        return tuple(f"{STAGE}{stage}" for stage in self.stages)

    @property
    def _reads_words(self) -> bool:
        return bool(self.stages) and self.place == "response"

    @property
    def reads(self) -> Reads:
        return Reads(
            teacher="states",
            places=(self.place,),
            vocabulary=True,
            grids=self.place == "visual",
            student_taps=(*self._layer_taps, *self._stage_taps, *((WORDS,) if self._reads_words else ())),
            labels=self.place == "response",
            before_decoder=not self.layers,
        )

    def module(self, widths: Widths) -> nn.Module:
        for tap in self._layer_taps:
            if (width := width_of(tap, widths.student_taps)) != widths.student:
                raise ValueError(
                    f"{tap} of the student is {width} wide and its head reads {widths.student}: no exit fits"
                )
        exits: list[nn.Module] = [Exit(widths.student, self.width) for _ in self.layers]
        words = 2 * width_of(WORDS, widths.student_taps) if self._reads_words else 0
        for tap in self._stage_taps:
            stage = width_of(tap, widths.student_taps)
            exits.append(StageExit(stage, words, self.width, widths.student))
        return nn.ModuleList(exits)

    def total(self, seen: Seen) -> Tensor:
        student, teacher = seen.heads()
        teacher_NE, targets_N = seen.teacher_rows(self.place), seen.targets(self.place)
        asked = enhanced(
            teacher_NE,
            teacher.head_VD,
            targets_N,
            gamma=self.gamma,
            form=self.form,
            bias_U=teacher.bias_V,
            cap=teacher.cap,
            num_common=seen.num_common,
        )
        # g c tanh(z / c) is the logit g z under the cap g c.
        bias_U = None if teacher.bias_V is None else asked.sharpness * teacher.bias_V
        cap = None if teacher.cap is None else asked.sharpness * teacher.cap
        total = []
        for states_ND, is_taught_N in self._read(seen):
            result = seen.formulas.head_loss(
                states_ND,
                student.head_VD.detach(),
                targets_N,
                ce_weight_N=asked.ce_weight_N * is_taught_N,
                kl_weight_N=asked.kl_weight_N * is_taught_N,
                student_bias_V=None if student.bias_V is None else student.bias_V.detach(),
                teacher_NE=asked.sharpness * teacher_NE,
                teacher_head_UE=teacher.head_VD,
                teacher_bias_U=bias_U,
                student_cap=student.cap,
                teacher_cap=cap,
                num_common=seen.num_common,
                active_rows=(len(targets_N), 0),
            )
            total.append(result.loss)
        return torch.stack(total).sum()

    def _read(self, seen: Seen) -> Iterator[tuple[Tensor, Tensor | float]]:
        """What the head reads at each exit, [N, D], and which of the rows count."""
        exits = seen.module
        assert isinstance(exits, nn.ModuleList)
        taps = (*self._layer_taps, *self._stage_taps)
        for exit_, tap in zip(exits, taps, strict=True):
            if isinstance(exit_, Exit):
                yield exit_(seen.tapped_rows(self.place, tap)), 1.0
            elif self.place == "visual":
                yield exit_(seen.stage_rows(tap)), 1.0
            else:
                states_NC, has_picture_N = seen.stages_of_answers(tap)
                yield exit_(states_NC, seen.text_before(WORDS)), has_picture_N


@dataclass(frozen=True, kw_only=True)
class VisualExitLogits(ExitLogits):
    label: ClassVar[str] = "visual tokens at early exits of the student, against the teacher's output"
    denominator: ClassVar[Denominator] = VISUAL_TOKENS
    place: ClassVar[Place] = "visual"
