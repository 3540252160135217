"""The settings of the student and of the teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from typing_extensions import Doc

from llava_kd.config.adapters import LoraConfig, check_teacher_bits
from llava_kd.config.ranges import require
from llava_kd.config.teaching.several import SeveralConfig
from llava_kd.config.teaching.visual_dependency import VisualDependencyConfig

PARTS = ("vision_tower", "multi_modal_projector", "language_model")

Dtype = Literal["bfloat16", "float16", "float32"]
Bits = Literal["4bit", "8bit"]


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """Either `checkpoint`, or the parts of a new model."""

    checkpoint: Annotated[
        str | None, Doc("LLaVA directory to continue from, instead of `vision_tower` and `language_model`.")
    ] = None
    vision_tower: Annotated[
        str | None,
        Doc("Vision tower of a new student: a local path or an id; also `timm:` and `open_clip:` ids."),
    ] = None
    language_model: Annotated[str | None, Doc("Language model of a new student: a local path or an id.")] = (
        None
    )
    vision_feature_layer: Annotated[
        int, Doc("Layer of the tower whose output is used as features; negative numbers count from the last.")
    ] = -2
    vision_feature_select_strategy: Annotated[
        Literal["default", "full"], Doc("`default` drops the first token of the tower; `full` keeps all.")
    ] = "full"
    drops_logit_cap: Annotated[
        bool, Doc("Remove the logit cap of a new student's language model, such as Gemma 2's.")
    ] = False
    lora: Annotated[LoraConfig | None, Doc("Train the language model only through LoRA adapters.")] = None
    quantize: Annotated[Bits | None, Doc("Quantize the language model's weights; needs `lora`.")] = None
    projector: Annotated[
        Literal["own", "teacher", "conv_attention"],
        Doc(
            "`own`: new; `teacher`: the teacher's, frozen, plus a linear map; `conv_attention`: on the grid."
        ),
    ] = "own"
    projector_start: Annotated[
        Literal["random", "closed_form"],
        Doc(
            "Initial weights of a new projector: random, or fitted to pictures and words of the stage's data."
        ),
    ] = "random"
    template: Annotated[str | None, Doc("Prompt template of this model; null: `data.template`.")] = None

    where: ClassVar[str] = "student"

    def __post_init__(self) -> None:
        parts = (self.vision_tower, self.language_model)
        require(
            (self.checkpoint is not None) != any(parts) and (self.checkpoint is not None or all(parts)),
            f"`{self.where}` needs either `checkpoint`, or both `vision_tower` and `language_model`; got "
            f"checkpoint={self.checkpoint}, vision_tower={parts[0]}, language_model={parts[1]}",
        )
        require(
            not self.drops_logit_cap or self.checkpoint is None,
            f"`{self.where}.drops_logit_cap` is only for a new student; a student from "
            f"`{self.where}.checkpoint` is a stock LLaVA, which has no cap: leave it out",
        )
        require(
            self.projector == "own" or self.checkpoint is None,
            f"`{self.where}.projector` is only for a new student; a student from `{self.where}.checkpoint` "
            "keeps its projector: leave projector out",
        )
        require(
            self.projector_start == "random" or (self.projector == "own" and self.checkpoint is None),
            f"`{self.where}.projector_start: closed_form` is of a new student with its own projector; one "
            f"that goes on from `{self.where}.checkpoint`, or takes the teacher's, has learned already, and "
            "conv_attention is no linear map: leave it out",
        )


@dataclass(frozen=True, kw_only=True)
class PeerConfig(StudentConfig):
    """The same settings, of a second student."""

    where: ClassVar[str] = "peer"


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    checkpoint: Annotated[
        str, Doc("Stock LLaVA directory, or a directory of another image-text-to-text model.")
    ]
    dtype: Annotated[Dtype, Doc("Data type of the teacher's weights.")] = "bfloat16"
    quantize: Annotated[
        Literal["8bit"] | None, Doc("Quantize the weights of the teacher's language model.")
    ] = None
    placement: Annotated[
        Literal["replicated", "fsdp", "cpu_offload"],
        Doc(
            "`replicated`: whole on every rank; `fsdp`: layers sharded; `cpu_offload`: on the CPU until used."
        ),
    ] = "replicated"
    cache: Annotated[
        str | None,
        Doc(
            "Directory of `llava-kd cache-teacher`; its predictions are read instead of running the teacher."
        ),
    ] = None
    template: Annotated[str | None, Doc("Prompt template of this model; null: `data.template`.")] = None
    several: Annotated[SeveralConfig | None, Doc("More teachers in addition to this one; null: none.")] = None
    visual_dependency: Annotated[
        VisualDependencyConfig | None,
        Doc("More weight for response tokens that need the picture; null: equal weights."),
    ] = None

    def __post_init__(self) -> None:
        check_teacher_bits(self.quantize, self.placement)
        if self.several is not None:
            self.several.check_beside(self.checkpoint, self.cache)
        if self.visual_dependency is not None:
            self.visual_dependency.check_beside(cache=self.cache, is_several=self.several is not None)

    @property
    def others(self) -> list[str]:
        """Directories of the teachers beside this one."""
        return [] if self.several is None else self.several.checkpoints
