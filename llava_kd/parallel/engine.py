"""What the trainer asks of a training engine, and the state that every engine can write and read."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from llava_kd.parallel.world import World

STATE_KINDS = ("parameter", "exp_avg", "exp_avg_sq")
REDUCE_BUCKET = 500_000_000  # elements of ZeRO's buffer for gradients on their way, at most; DeepSpeed's own


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters of the unwrapped module, by name, that share a learning rate."""

    names: Sequence[str]
    lr: float


@dataclass(frozen=True, kw_only=True)
class AdamWSettings:
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0


class Engine(Protocol):
    """One optimiser over one wrapped module.

    `state` holds the trained parameters in fp32 and both Adam moments under their names in the unwrapped
    module, whole, on the CPU, on rank 0 (empty on the others): the same from every engine, so that a run may
    go on under another engine or on another number of ranks.
    """

    world: World
    is_sharded: bool
    """Whether weights are gathered while they are used, so that all ranks must use them equally often."""

    def forward(self, *args: Any, is_last: bool, **kwargs: Any) -> Any:
        """Call the wrapped module; gradients are exchanged only where `is_last`."""
        ...

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """`loss` is divided by global counts already: the gradient is its sum over ranks, not its mean."""
        ...

    def inference(self) -> AbstractContextManager[None]:
        """In the block the parts of the unwrapped module may be called by themselves, without gradients.

        Only after a first step.
        """
        ...

    def whole(self, part: nn.Module) -> AbstractContextManager[dict[str, Tensor]]:
        """Parameters of a part of the unwrapped module, by their names in it, whole and in computing types.

        On every rank, and in the block alone. All ranks must enter it, and what they do in it need not agree:
        nothing is exchanged there. They are to be read, not written.
        """
        ...

    def step(self, *, lr_multiplier: float, max_grad_norm: float) -> Tensor:
        """Clip, update, clear gradients; returns the norm before clipping."""
        ...

    def parameters(self) -> dict[str, Tensor]:
        """Every parameter of the unwrapped module, whole, on rank 0."""
        ...

    def replicas(self) -> dict[str, Tensor]:
        """The trained parameters as this rank computes with them; empty where they are sharded."""
        ...

    def state(self) -> dict[str, Tensor]: ...

    def load_state(self, state: dict[str, Tensor], *, num_steps: int) -> None:
        """Every rank passes the same whole state; `num_steps` is how many updates it has seen."""
        ...


def check_parts(state: dict[str, Tensor], names: Collection[str]) -> None:
    """Raises ValueError if the state holds a parameter that is none of `names`."""
    if other := sorted({key.split("/", 1)[1] for key in state} - set(names)):
        raise ValueError(
            f"the checkpoint holds {other[0]!r}, which is not trained here: it was written by a run that "
            "trained other parts; resume with the same `trainable`, or start in a new output_dir"
        )


def split_state(state: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Parameter and both moments of `name`. Raises ValueError if the state holds other parameters."""
    keys = [f"{kind}/{name}" for kind in STATE_KINDS]
    missing = [key for key in keys if key not in state]
    if missing:
        raise ValueError(
            f"the checkpoint has no {missing[0]!r}: it was written by a run that trained other parts; "
            "resume with the same `trainable`, or start in a new output_dir"
        )
    parameter, exp_avg, exp_avg_sq = (state[key] for key in keys)
    return parameter, exp_avg, exp_avg_sq
