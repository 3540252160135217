"""The settings of a stage: what they are called, their defaults, and which fit together."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Literal

from annotated_types import Ge, Interval, Le, MinLen
from typing_extensions import Doc

from llava_kd.config.adapters import check_adapters
from llava_kd.config.data import DataConfig
from llava_kd.config.evaluate import EvaluateConfig, check_best
from llava_kd.config.models import PARTS, StudentConfig, TeacherConfig
from llava_kd.config.ranges import NotNegativeFloat, PositiveFloat, PositiveInt, require
from llava_kd.config.running import CheckpointConfig, EngineConfig, LogConfig, OptimConfig
from llava_kd.config.terms import (
    AttentionConfig,
    DBiLDConfig,
    VisualSwitchConfig,
    Weighted,
    check_moves,
    check_needs_the_model,
    check_switch,
)

Divergence = Literal["forward", "reverse", "jsd", "skewed_forward", "skewed_reverse"]


_Weight = Annotated[NotNegativeFloat, Doc("What the term is multiplied by.")]


@dataclass(frozen=True, kw_only=True)
class CrossEntropyConfig:
    weight: _Weight = 1.0


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    weight: _Weight = 1.0
    temperature: Annotated[PositiveFloat, Doc("What both models' logits are divided by.")] = 1.0
    divergence: Annotated[Divergence, Doc("Which one, from the teacher to the student.")] = "forward"
    mix: Annotated[
        float,
        Interval(gt=0, lt=1),
        Doc("Beta of `jsd`, alpha of the skewed forms; at the ends, use `forward` or `reverse`."),
    ] = 0.5


@dataclass(frozen=True, kw_only=True)
class RelationConfig:
    weight: _Weight = 0.5
    tap: Annotated[
        Literal["logits", "hidden", "projector"],
        Doc("Where visual tokens are compared: LM-head logits, final hidden states, projector output."),
    ] = "logits"
    centre: Annotated[bool, Doc("Take the mean over an image's tokens away first.")] = False
    normalise: Annotated[bool, Doc("Scale every token's vector to length 1 first.")] = False


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """A term that is absent is off."""

    cross_entropy: Annotated[CrossEntropyConfig | None, Doc("Of the response tokens.")] = None
    response_kl: Annotated[KLConfig | None, Doc("Divergence at the response tokens.")] = None
    visual_kl: Annotated[KLConfig | None, Doc("Divergence at the visual tokens.")] = None
    relation: Annotated[RelationConfig | None, Doc("Relations among the visual tokens of an image.")] = None
    response_dbild: Annotated[
        DBiLDConfig | None, Doc("Differences of logits among each side's own largest.")
    ] = None
    visual_switch: Annotated[
        VisualSwitchConfig | None, Doc("The same against the teacher over the student's visual output.")
    ] = None
    attention: Annotated[AttentionConfig | None, Doc("Visual attention in decoder layers.")] = None
    losses: Annotated[Literal["fast", "reference"], Doc("`fast`, or `reference` for the plain formulas.")] = (
        "fast"
    )

    def __post_init__(self) -> None:
        require(bool(self.terms), "`objective` has no term; give it at least one")
        require(
            any(term.weight > 0 for term in self.terms.values()),
            f"the weights of `objective` are all 0 ({', '.join(self.terms)}): nothing would be learned; set "
            "one of them to more",
        )

    @property
    def terms(self) -> dict[str, Weighted]:
        """Those that are on, by name."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "losses"}
        return {name: term for name, term in found.items() if term is not None}

    @property
    def needs_teacher(self) -> bool:
        return bool(self.terms.keys() - {"cross_entropy"})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One stage."""

    output_dir: Annotated[str, Doc("Directory of the run: its log, checkpoints, and `model/`.")]
    student: Annotated[StudentConfig, Doc("The model that learns.")]
    data: Annotated[DataConfig, Doc("Records, and how they become sequences.")]
    objective: Annotated[ObjectiveConfig, Doc("Loss terms; one that is absent is off.")]
    optim: Annotated[OptimConfig, Doc("The optimiser, and the schedule of its rate.")]
    trainable: Annotated[
        list[str],
        MinLen(1),
        Doc("Parts that learn, of vision_tower, multi_modal_projector and language_model."),
    ]
    vision_tower_last_layers: Annotated[
        PositiveInt | None, Doc("Layers of a trained tower; null is all that its features come from.")
    ] = None
    global_batch_size: Annotated[PositiveInt, Doc("Records of an optimiser step, over all ranks.")]
    micro_batch_size: Annotated[PositiveInt, Doc("Records of a forward on one rank.")]
    epochs: Annotated[PositiveFloat, Doc("How many times the data is read.")] = 1.0
    max_steps: Annotated[PositiveInt | None, Doc("Optimiser steps, instead of `epochs`.")] = None
    seed: Annotated[int, Ge(0), Le(2**63 - 1), Doc("Of new weights and of the order of records.")] = 0
    teacher: Annotated[TeacherConfig | None, Doc("The model that is learned from; null is none.")] = None
    engine: Annotated[EngineConfig, Doc("What runs a step, on which devices.")] = field(
        default_factory=EngineConfig
    )
    log: Annotated[LogConfig, Doc("Figures of the run, and where they go.")] = field(
        default_factory=LogConfig
    )
    checkpoint: Annotated[CheckpointConfig, Doc("What a run goes on from.")] = field(
        default_factory=CheckpointConfig
    )
    evaluate: Annotated[EvaluateConfig | None, Doc("Questions that are asked on the way.")] = None

    def __post_init__(self) -> None:
        unknown = set(self.trainable) - set(PARTS)
        require(not unknown, f"`trainable` names no part {sorted(unknown)}; parts are {list(PARTS)}")
        untrained = sorted(set(self.optim.lr_by_part) - set(self.trainable))
        require(
            not untrained,
            f"`optim.lr_by_part` gives a rate to {untrained}, which `trainable` does not name; add it there, "
            "or take it out of lr_by_part",
        )
        require(
            self.vision_tower_last_layers is None or "vision_tower" in self.trainable,
            f"`vision_tower_last_layers` is {self.vision_tower_last_layers} but `trainable` is "
            f"{list(self.trainable)}; add vision_tower to it, or set vision_tower_last_layers to null",
        )
        reuses_teacher = self.student.projector == "teacher"
        require(
            self.teacher is not None or not reuses_teacher,
            "`student.projector` is teacher but `teacher` is null; set teacher.checkpoint",
        )
        if self.teacher is not None:
            needs = {
                "objective.visual_switch": self.objective.visual_switch,
                "objective.attention": self.objective.attention,
                "student.projector": reuses_teacher,
            }
            check_needs_the_model(needs, self.teacher.cache)
            require(
                self.teacher.cache is None or self.data.decode == "cpu",
                f"`teacher.cache` ({self.teacher.cache}) holds predictions for the pixels of a CPU decoder; "
                f"`data.decode` {self.data.decode} makes others: set it to cpu",
            )
        if self.objective.visual_switch is not None and self.teacher is not None:
            check_switch(self.objective.visual_switch, self.trainable, self.teacher.placement)
        check_moves(self.objective.terms, self.trainable)
        if self.objective.needs_teacher and self.teacher is None:
            raise ValueError(
                "`objective` has distillation terms but `teacher` is null; set teacher.checkpoint, or remove "
                "response_kl, visual_kl and relation"
            )
        if self.teacher is not None and not self.objective.needs_teacher and not reuses_teacher:
            raise ValueError(
                "`teacher` is set but no term of `objective` uses it; add response_kl, visual_kl or "
                "relation, or set teacher to null"
            )
        require(
            self.global_batch_size % self.micro_batch_size == 0,
            f"`global_batch_size` ({self.global_batch_size}) must be a multiple of `micro_batch_size` "
            f"({self.micro_batch_size})",
        )
        check_adapters(
            has_lora=self.student.lora is not None,
            quantize=self.student.quantize,
            trains_language_model="language_model" in self.trainable,
            engine_kind=self.engine.kind,
        )
        asked = self.evaluate
        slices, losses = ({}, {}) if asked is None else (asked.slices, asked.losses)
        check_best(self.checkpoint.best, self.checkpoint.export, slices, losses)
