"""The settings of the optimiser, the engine, the log and the checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Gt, Interval, Le
from typing_extensions import Doc

from llava_kd.config.models import PARTS
from llava_kd.config.ranges import (
    NotNegativeFloat,
    NotNegativeInt,
    PositiveFloat,
    PositiveInt,
    Share,
    require,
)

_MOST_PROFILED = 100

_Beta = Annotated[float, Interval(ge=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with a cosine schedule."""

    lr: Annotated[
        PositiveFloat, Doc("Highest learning rate, after the warm-up; then a half cosine down to 0.")
    ]
    lr_by_part: Annotated[dict[str, PositiveFloat], Doc("Other rates than `lr`, by the name of a part.")] = (
        field(default_factory=dict)
    )
    betas: Annotated[tuple[_Beta, _Beta], Doc("Decay of AdamW's means of the gradient and its square.")] = (
        0.9,
        0.999,
    )
    eps: Annotated[PositiveFloat, Doc("AdamW's addend to the root of the mean square.")] = 1e-8
    weight_decay: Annotated[NotNegativeFloat, Doc("AdamW's, times the rate.")] = 0.0
    warmup_ratio: Annotated[Share, Doc("Share of the steps in which the rate rises from 0.")] = 0.03
    max_grad_norm: Annotated[PositiveFloat, Doc("Longer gradients are scaled down to this norm.")] = 1.0

    def __post_init__(self) -> None:
        unknown = set(self.lr_by_part) - set(PARTS)
        require(not unknown, f"`optim.lr_by_part` names no part {sorted(unknown)}; parts are {list(PARTS)}")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    kind: Annotated[
        Literal["auto", "single", "ddp", "fsdp2", "deepspeed"],
        Doc("`auto` is `single` on one process and `ddp` on several."),
    ] = "auto"
    zero_stage: Annotated[Literal[1, 2, 3] | None, Doc("Of `deepspeed` alone; null is 3.")] = None
    precision: Annotated[Literal["bf16", "fp32"], Doc("What forward and backward compute in.")] = "bf16"
    activation_checkpointing: Annotated[
        bool, Doc("Recompute the activations of decoder layers in the backward, to hold fewer.")
    ] = False
    device: Annotated[Literal["auto", "cpu", "cuda"], Doc("`auto` is a GPU where there is one.")] = "auto"
    timeout_minutes: Annotated[
        float, Gt(0), Le(525_600), Doc("How long a rank waits for the others before it gives up.")
    ] = 60.0

    def __post_init__(self) -> None:
        require(
            self.zero_stage is None or self.kind == "deepspeed",
            f"`engine.zero_stage` is {self.zero_stage} but `engine.kind` is {self.kind}: two engines; set "
            "engine.kind to deepspeed, or zero_stage to null",
        )

    @property
    def shards(self) -> bool:
        """Whether no rank holds whole weights."""
        return self.kind == "fsdp2" or (self.kind == "deepspeed" and self.zero_stage in (None, 3))


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """`metrics.jsonl` is always written; the trackers are extra."""

    every: Annotated[PositiveInt, Doc("Steps from one line of figures to the next.")] = 10
    diagnostics_every: Annotated[
        NotNegativeInt,
        Doc("Steps from one look at gradients per term and at both models' tokens to the next; 0 is never."),
    ] = 50
    wandb_project: Annotated[str | None, Doc("Project of Weights & Biases; null is none.")] = None
    wandb_name: Annotated[str | None, Doc("Name of the run there; null is that of `output_dir`.")] = None
    wandb_entity: Annotated[str | None, Doc("User or team there; null is WANDB_ENTITY, or your own.")] = None
    wandb_group: Annotated[str | None, Doc("Group of the run, as of all stages of a student.")] = None
    wandb_tags: Annotated[list[str], Doc("Words by which the run is found there.")] = field(
        default_factory=list
    )
    wandb_id: Annotated[
        str | None, Doc("Id of the run; null is WANDB_RUN_ID, or one that is drawn and kept in `output_dir`.")
    ] = None
    tensorboard: Annotated[bool, Doc("Write TensorBoard's files too.")] = False
    progress: Annotated[
        bool, Doc("Show a line that is written over on a terminal, and one every `every` steps elsewhere.")
    ] = True
    progress_line: Annotated[NotNegativeInt, Doc("Line of the terminal where it stands.")] = 0

    def __post_init__(self) -> None:
        given = [key for key in ("name", "entity", "group", "tags", "id") if getattr(self, f"wandb_{key}")]
        require(
            not given or self.wandb_project is not None,
            f"`log.wandb_{given[0] if given else ''}` belongs to a run of wandb; set log.wandb_project too",
        )


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """What PyTorch's profiler saw of a few steps, in `output_dir/profile`."""

    steps: Annotated[
        tuple[PositiveInt, PositiveInt], Doc("First and last step that is traced, counted from 1.")
    ]

    def __post_init__(self) -> None:
        first, last = self.steps
        require(
            first <= last <= first + _MOST_PROFILED,
            f"`profile.steps` must be a first and a last step, at most {_MOST_PROFILED} later, for a trace "
            f"holds every operator; got {first} and {last}",
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: Annotated[PositiveInt, Doc("Steps from one to the next; there is one at the end as well.")] = 500
    keep: Annotated[PositiveInt, Doc("How many of the newest are kept.")] = 2
    best: Annotated[
        str | None,
        Doc("Figure such as `slice/NAME` or `loss/NAME`; the checkpoint where it was best is kept too."),
    ] = None
    export: Annotated[Literal["last", "best"], Doc("Which of them the stage's `model/` is.")] = "last"
