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
        PositiveFloat, Doc("Peak learning rate, reached after the warm-up; then a half cosine down to 0.")
    ]
    lr_by_part: Annotated[
        dict[str, PositiveFloat],
        Doc("Learning rates of parts that differ from `lr`, by the name of the part."),
    ] = field(default_factory=dict)
    betas: Annotated[
        tuple[_Beta, _Beta], Doc("AdamW's betas: decay of the means of the gradient and of its square.")
    ] = (
        0.9,
        0.999,
    )
    eps: Annotated[PositiveFloat, Doc("AdamW's epsilon, added to the root of the mean square.")] = 1e-8
    weight_decay: Annotated[NotNegativeFloat, Doc("AdamW's weight decay, times the learning rate.")] = 0.0
    warmup_ratio: Annotated[Share, Doc("Share of the steps in which the learning rate rises from 0.")] = 0.03
    max_grad_norm: Annotated[
        PositiveFloat, Doc("Gradients with a larger norm are scaled down to this norm.")
    ] = 1.0

    def __post_init__(self) -> None:
        unknown = set(self.lr_by_part) - set(PARTS)
        require(not unknown, f"`optim.lr_by_part` must name parts of {list(PARTS)}; got {sorted(unknown)}")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    kind: Annotated[
        Literal["auto", "single", "ddp", "fsdp2", "deepspeed"],
        Doc("`auto` is `single` on one process and `ddp` on several."),
    ] = "auto"
    zero_stage: Annotated[Literal[1, 2, 3] | None, Doc("ZeRO stage, only for `deepspeed`; null is 3.")] = None
    precision: Annotated[Literal["bf16", "fp32"], Doc("Data type of forward and backward.")] = "bf16"
    activation_checkpointing: Annotated[
        bool, Doc("Recompute the activations of decoder layers in the backward, to save memory.")
    ] = False
    device: Annotated[Literal["auto", "cpu", "cuda"], Doc("`auto` is a GPU if there is one.")] = "auto"
    timeout_minutes: Annotated[
        float, Gt(0), Le(525_600), Doc("How long a rank waits for the other ranks before it fails.")
    ] = 60.0

    def __post_init__(self) -> None:
        require(
            self.zero_stage is None or self.kind == "deepspeed",
            f"`engine.zero_stage` is {self.zero_stage} but `engine.kind` is {self.kind}, and only "
            "deepspeed has ZeRO stages; set engine.kind to deepspeed, or zero_stage to null",
        )

    @property
    def shards(self) -> bool:
        """Whether no rank holds whole weights."""
        return self.kind == "fsdp2" or (self.kind == "deepspeed" and self.zero_stage in (None, 3))


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """`metrics.jsonl` is always written; the trackers are extra."""

    every: Annotated[PositiveInt, Doc("Steps between lines of metrics.")] = 10
    diagnostics_every: Annotated[
        NotNegativeInt,
        Doc("Steps between diagnostics of gradients per term and of both models' tokens; 0 is never."),
    ] = 50
    wandb_project: Annotated[str | None, Doc("Project in Weights & Biases; null: do not use it.")] = None
    wandb_name: Annotated[str | None, Doc("Name of the run in W&B; null: the name of `output_dir`.")] = None
    wandb_entity: Annotated[str | None, Doc("W&B user or team; null: WANDB_ENTITY, else your default.")] = (
        None
    )
    wandb_group: Annotated[str | None, Doc("W&B group of the run, such as all stages of a student.")] = None
    wandb_tags: Annotated[list[str], Doc("W&B tags of the run.")] = field(default_factory=list)
    wandb_id: Annotated[
        str | None, Doc("W&B id of the run; null: WANDB_RUN_ID, else a random id, stored in `output_dir`.")
    ] = None
    tensorboard: Annotated[bool, Doc("Also write TensorBoard files.")] = False
    progress: Annotated[
        bool, Doc("Show progress: one updated line on a terminal; elsewhere a line every `every` steps.")
    ] = True
    progress_line: Annotated[NotNegativeInt, Doc("Terminal line on which the progress is shown.")] = 0

    def __post_init__(self) -> None:
        given = [key for key in ("name", "entity", "group", "tags", "id") if getattr(self, f"wandb_{key}")]
        require(
            not given or self.wandb_project is not None,
            f"`log.wandb_{given[0] if given else ''}` needs log.wandb_project; set it too, or leave this "
            "setting out",
        )


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """What PyTorch's profiler saw of a few steps, in `output_dir/profile`."""

    steps: Annotated[tuple[PositiveInt, PositiveInt], Doc("First and last step to trace, counted from 1.")]

    def __post_init__(self) -> None:
        first, last = self.steps
        require(
            first <= last <= first + _MOST_PROFILED,
            f"`profile.steps` must be a first and a last step, at most {_MOST_PROFILED} later, for a trace "
            f"holds every operator; got {first} and {last}",
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: Annotated[PositiveInt, Doc("Steps between checkpoints; one is also written at the end.")] = 500
    keep: Annotated[PositiveInt, Doc("Number of newest checkpoints to keep.")] = 2
    best: Annotated[
        str | None,
        Doc("Figure such as `slice/NAME` or `loss/NAME`; the checkpoint with the best value is kept too."),
    ] = None
    export: Annotated[Literal["last", "best"], Doc("Which checkpoint becomes the stage's `model/`.")] = "last"
