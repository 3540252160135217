"""The settings of a stage: what they are called, their defaults, and which fit together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge, Le, MinLen
from typing_extensions import Doc

from llava_kd.config.adapters import check_adapters
from llava_kd.config.data import DataConfig
from llava_kd.config.evaluate import EvaluateConfig, check_best
from llava_kd.config.models import PARTS, PeerConfig, StudentConfig, TeacherConfig
from llava_kd.config.objective import ObjectiveConfig
from llava_kd.config.pictures import PicturesConfig, check_pictures
from llava_kd.config.ranges import PositiveFloat, PositiveInt, require
from llava_kd.config.running import CheckpointConfig, EngineConfig, LogConfig, OptimConfig, ProfileConfig
from llava_kd.config.teaching.on_policy import OnPolicyConfig, check_on_policy
from llava_kd.config.teaching.peer import check_peer
from llava_kd.config.teaching.token_policy import TokenPolicyConfig


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One stage."""

    output_dir: Annotated[str, Doc("Run directory: log, checkpoints, and `model/`.")]
    student: Annotated[StudentConfig, Doc("The model to train.")]
    data: Annotated[DataConfig, Doc("Training records, and how they become sequences.")]
    objective: Annotated[ObjectiveConfig, Doc("Loss terms; a term that is not named is off.")]
    optim: Annotated[OptimConfig, Doc("The optimiser and its learning rate schedule.")]
    trainable: Annotated[
        list[str],
        MinLen(1),
        Doc("Parts of the student to train: vision_tower, multi_modal_projector, language_model."),
    ]
    vision_tower_last_layers: Annotated[
        PositiveInt | None,
        Doc("Number of last layers of the tower to train; null: all layers that its features depend on."),
    ] = None
    global_batch_size: Annotated[PositiveInt, Doc("Records per optimiser step, over all ranks.")]
    micro_batch_size: Annotated[PositiveInt, Doc("Records per forward pass on one rank.")]
    epochs: Annotated[PositiveFloat, Doc("Number of passes over the data.")] = 1.0
    max_steps: Annotated[PositiveInt | None, Doc("Number of optimiser steps, instead of `epochs`.")] = None
    seed: Annotated[
        int, Ge(0), Le(2**63 - 1), Doc("Random seed of new weights and of the order of records.")
    ] = 0
    teacher: Annotated[TeacherConfig | None, Doc("The model that the student learns from; null: none.")] = (
        None
    )
    peer: Annotated[
        PeerConfig | None,
        Doc("A second student, trained together with the first; each teaches the other. Null: none."),
    ] = None
    token_policy: Annotated[
        TokenPolicyConfig | None, Doc("How private tokens are treated; null: like all others.")
    ] = None
    on_policy: Annotated[
        OnPolicyConfig | None, Doc("Train on answers that the student generates during training; null: none.")
    ] = None
    pictures: Annotated[
        PicturesConfig | None, Doc("Changes of the pictures that both models read; null: none.")
    ] = None
    engine: Annotated[EngineConfig, Doc("Parallelism, precision and devices.")] = field(
        default_factory=EngineConfig
    )
    log: Annotated[LogConfig, Doc("Metrics of the run, and where they are written.")] = field(
        default_factory=LogConfig
    )
    profile: Annotated[ProfileConfig | None, Doc("Steps to trace with the profiler; null: none.")] = None
    checkpoint: Annotated[CheckpointConfig, Doc("Checkpoints, from which a stopped run resumes.")] = field(
        default_factory=CheckpointConfig
    )
    evaluate: Annotated[EvaluateConfig | None, Doc("Evaluation during training.")] = None
    plugins: Annotated[
        list[str],
        Doc("Your own Python files or modules with terms, towers, sources and templates."),
    ] = field(default_factory=list)

    def __post_init__(self) -> None:
        unknown = set(self.trainable) - set(PARTS)
        require(not unknown, f"`trainable` must name parts of {list(PARTS)}; got {sorted(unknown)}")
        untrained = sorted(set(self.optim.lr_by_part) - set(self.trainable))
        require(
            not untrained,
            f"`optim.lr_by_part` sets a rate for {untrained}, but `trainable` does not name it; add it "
            "there, or remove it from lr_by_part",
        )
        require(
            self.vision_tower_last_layers is None or "vision_tower" in self.trainable,
            f"`vision_tower_last_layers` is {self.vision_tower_last_layers} but `trainable` is "
            f"{list(self.trainable)}; add vision_tower to it, or set vision_tower_last_layers to null",
        )
        self._check_students()
        reuses_teacher = self.student.projector == "teacher"
        require(
            self.teacher is not None or not reuses_teacher,
            "`student.projector` is teacher but `teacher` is null; set teacher.checkpoint",
        )
        self.objective.check_stage(
            self.trainable,
            placement=self._placement,
            cache=None if self.teacher is None else self.teacher.cache,
            others={
                "student.projector": reuses_teacher,
                "pictures": self.pictures is not None,
                "on_policy": self.on_policy is not None,
            },
        )
        check_on_policy(self)
        if self.pictures is not None:
            require(
                self.token_policy is None,
                "`pictures` and `token_policy` both weight the labels, which was never tested together; "
                "set one to null",
            )
            check_pictures(self.pictures, self.teacher, self.objective.terms, self.engine.kind)
        self.objective.check_teacher(
            has_teacher=self.teacher is not None or self.peer is not None, is_used=reuses_teacher
        )
        if self.teacher is not None:
            require(
                self.teacher.cache is None or self.data.decode == "cpu",
                f"`teacher.cache` ({self.teacher.cache}) holds predictions for the pixels of a CPU "
                f"decoder; `data.decode` {self.data.decode} gives other pixels: set it to cpu",
            )
            if self.teacher.visual_dependency is not None:
                self.teacher.visual_dependency.check_engine(self.engine.kind)
        require(
            self.global_batch_size % self.micro_batch_size == 0,
            f"`global_batch_size` ({self.global_batch_size}) must be a multiple of `micro_batch_size` "
            f"({self.micro_batch_size})",
        )
        asked = self.evaluate
        slices, losses = ({}, {}) if asked is None else (asked.slices, asked.losses)
        check_best(self.checkpoint.best, self.checkpoint.export, slices, losses)

    def _check_students(self) -> None:
        """ValueError where one of the students does not fit what is trained, or a peer what is beside it."""
        for one in (self.student, self.peer):
            if one is not None:
                check_adapters(
                    has_lora=one.lora is not None,
                    quantize=one.quantize,
                    trains_language_model="language_model" in self.trainable,
                    engine_kind=self.engine.kind,
                    whose=one.where,
                )
        if self.peer is not None:
            check_peer(
                self._beside_peer,
                self.objective.terms,
                projector=self.peer.projector,
                engine_kind=self.engine.kind,
            )

    @property
    def _placement(self) -> str | None:
        """Of whoever teaches; None where nobody does."""
        if self.peer is not None:
            return "replicated"
        return None if self.teacher is None else self.teacher.placement

    @property
    def _beside_peer(self) -> dict[str, object]:
        """What does not fit a peer."""
        teacher = self.teacher
        return {
            "teacher.cache": None if teacher is None else teacher.cache,
            "teacher.several": None if teacher is None else teacher.several,
            "teacher": teacher,
            "token_policy": self.token_policy,
            "pictures": self.pictures,
            "on_policy": self.on_policy,
            "objective.learned_weights": self.objective.learned_weights,
        }
