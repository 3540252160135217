"""The settings of a stage: what they are called, their defaults, and which fit together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from typing_extensions import Doc

from llava_kd.config.adapters import LoraConfig, check_adapters, check_teacher_bits
from llava_kd.config.checks import require
from llava_kd.config.evaluate import EvaluateConfig, check_best
from llava_kd.config.objective import ObjectiveConfig

PARTS = ("vision_tower", "multi_modal_projector", "language_model")

Dtype = Literal["bfloat16", "float16", "float32"]
Bits = Literal["4bit", "8bit"]


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """Either `checkpoint`, a LLaVA directory to go on from, or the parts of a new model.

    `projector`: a new one of its `own`, or the `teacher`'s, frozen, with a trained linear map to its width.
    `lora` trains the language model through adapters, on top of weights in few bits with `quantize`.
    `template` is that of `data` where it is null, here and for the teacher.
    """

    checkpoint: str | None = None
    vision_tower: str | None = None
    language_model: str | None = None
    vision_feature_layer: int = -2
    vision_feature_select_strategy: Literal["default", "full"] = "full"
    lora: LoraConfig | None = None
    quantize: Bits | None = None
    projector: Literal["own", "teacher"] = "own"
    template: str | None = None

    def __post_init__(self) -> None:
        parts = (self.vision_tower, self.language_model)
        require(
            (self.checkpoint is not None) != any(parts) and (self.checkpoint is not None or all(parts)),
            "`student` needs either `checkpoint`, or both `vision_tower` and `language_model`; got "
            f"checkpoint={self.checkpoint}, vision_tower={parts[0]}, language_model={parts[1]}",
        )
        require(
            self.projector == "own" or self.checkpoint is None,
            "`student.projector` is of a new student; one that goes on from `student.checkpoint` keeps the "
            "projector it has, its teacher's too: leave projector out",
        )


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """A stock LLaVA directory.

    `placement`: whole on every rank, its decoder layers spread over them, or on the CPU until they are used.
    `cache`: a directory of `llava-kd cache-teacher`, whose predictions stand in for running the teacher.
    """

    checkpoint: str
    dtype: Dtype = "bfloat16"
    quantize: Literal["8bit"] | None = None
    placement: Literal["replicated", "fsdp", "cpu_offload"] = "replicated"
    cache: str | None = None
    template: str | None = None

    def __post_init__(self) -> None:
        check_teacher_bits(self.quantize, self.placement)


@dataclass(frozen=True, kw_only=True)
class PackingConfig:
    """Rows hold several records, up to both budgets; `micro_batch_size` then counts rows.

    `packs_per_step`: rows of an optimiser step; null takes as many as hold about `global_batch_size` records.
    """

    max_tokens: int
    max_images: int = 64
    packs_per_step: int | None = None


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A part of a mixture; `path` and `images` as in `data`. An epoch reads its records `weight` times."""

    path: str
    images: str | None = None
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Records, and how they become sequences.

    `path` is a LLaVA JSON or JSON Lines file with its image root `images` (default: its folder), or a
    pattern of tar shards (`*.tar`) or of tables with embedded images (`*.parquet`, `*.arrow`). `sources` is
    a mixture of several, in its place. `follow_symlinks` lets links lead out of an image root.
    `template`: `auto` is the one of a model's own directory, or else of its language model's family.
    `image_aspect`: `square` as the image processor does, `pad` to a square of the mean colour first, which
    the student's saved processor then does too.
    `resize`: `exact` as Pillow does, or the CPU's `quick` kernel, which differs by 1 in some pixels.
    `decode`: `nvjpeg` decodes baseline JPEGs on the GPU, with the pixels of another chroma filter than every
    CPU decoder's; a damaged one then stops the run.
    `visual_alignment`: what to do where the two models have different visual tokens; `resample` interpolates
    the teacher's final hidden states to the student's grid.
    """

    path: str | None = None
    images: str | None = None
    sources: list[SourceConfig] = field(default_factory=list)
    follow_symlinks: bool = False
    template: str = "auto"
    max_length: int = 2048
    image_aspect: Literal["square", "pad"] = "square"
    decode: Literal["cpu", "nvjpeg"] = "cpu"
    resize: Literal["exact", "quick"] = "exact"
    visual_alignment: Literal["refuse", "resample"] = "refuse"
    num_workers: int = 4
    image_cache_mb: int = 0
    packing: PackingConfig | None = None
    max_bad_rate: float = 0.001

    def __post_init__(self) -> None:
        require(
            (self.path is None) == bool(self.sources),
            f"`data` needs either `path` or `sources`, a list; got path={self.path} and "
            f"{len(self.sources)} sources",
        )
        require(
            self.images is None or self.path is not None,
            f"`data.images` ({self.images}) belongs to `data.path`; each of `data.sources` has its own",
        )
        for number, source in enumerate(self.sources):
            require(
                source.weight > 0,
                f"`data.sources[{number}].weight` must be more than 0; got {source.weight:g}: leave a source "
                "out to read none of it",
            )
        paths = [source.path for source in self.sources]
        doubled = sorted({path for path in paths if paths.count(path) > 1})
        require(
            not doubled, f"`data.sources` names {doubled} twice; give it once, with the sum of the weights"
        )

    @property
    def parts(self) -> list[SourceConfig]:
        """The sources, or `path` as the only one."""
        return self.sources or [SourceConfig(path=self.path or "", images=self.images)]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with a cosine schedule. `lr_by_part` overrides `lr` for the named parts."""

    lr: float
    lr_by_part: dict[str, float] = field(default_factory=dict)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_ratio: float = 0.03
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        unknown = set(self.lr_by_part) - set(PARTS)
        require(not unknown, f"`optim.lr_by_part` names no part {sorted(unknown)}; parts are {list(PARTS)}")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """`auto` is `single` on one process and `ddp` on several. `zero_stage` is `deepspeed`'s alone; null is 3.

    A rank that waits `timeout_minutes` for the others gives up.
    """

    kind: Literal["auto", "single", "ddp", "fsdp2", "deepspeed"] = "auto"
    zero_stage: Literal[1, 2, 3] | None = None
    precision: Literal["bf16", "fp32"] = "bf16"
    activation_checkpointing: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout_minutes: float = 60.0

    def __post_init__(self) -> None:
        require(
            self.zero_stage is None or self.kind == "deepspeed",
            f"`engine.zero_stage` is {self.zero_stage} but `engine.kind` is {self.kind}: two engines; set "
            "engine.kind to deepspeed, or zero_stage to null",
        )


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """`metrics.jsonl` is always written; the trackers are extra. `progress_line`: where its bar stands."""

    every: int = 10
    wandb_project: str | None = None
    tensorboard: bool = False
    progress: bool = True
    progress_line: int = 0


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Every `every` steps and at the end; the newest `keep` are kept.

    `best`: a figure such as `slice/NAME` or `loss/NAME`; the checkpoint where it was best is kept as well.
    `export`: whether the stage's `model/` is that one, or the last.
    """

    every: int = 500
    keep: int = 2
    best: str | None = None
    export: Literal["last", "best"] = "last"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One stage.

    `vision_tower_last_layers`: how many layers of a trained tower; null is all that its features come from.
    """

    output_dir: str
    student: StudentConfig
    data: DataConfig
    objective: ObjectiveConfig
    optim: OptimConfig
    trainable: list[str]
    vision_tower_last_layers: int | None = None
    global_batch_size: int
    micro_batch_size: int
    epochs: float = 1.0
    max_steps: int | None = None
    seed: int = 0
    teacher: TeacherConfig | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig | None = None
    plugins: Annotated[
        list[str],
        Doc("your own Python files, or modules, whose terms, towers, sources and templates may be named"),
    ] = field(default_factory=list)

    def __post_init__(self) -> None:
        unknown = set(self.trainable) - set(PARTS)
        require(not unknown, f"`trainable` names no part {sorted(unknown)}; parts are {list(PARTS)}")
        require(bool(self.trainable), f"`trainable` is empty; name at least one of {list(PARTS)}")
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
        self.objective.check_stage(
            self.trainable,
            placement=None if self.teacher is None else self.teacher.placement,
            cache=None if self.teacher is None else self.teacher.cache,
            others={"student.projector": reuses_teacher},
        )
        self.objective.check_teacher(has_teacher=self.teacher is not None, is_used=reuses_teacher)
        if self.teacher is not None:
            require(
                self.teacher.cache is None or self.data.decode == "cpu",
                f"`teacher.cache` ({self.teacher.cache}) holds predictions for the pixels of a CPU decoder; "
                f"`data.decode` {self.data.decode} makes others: set it to cpu",
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
