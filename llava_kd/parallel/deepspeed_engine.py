"""DeepSpeed ZeRO-1, 2 and 3, driven directly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

from llava_kd.parallel.engine import (
    REDUCE_BUCKET,
    STATE_KINDS,
    AdamWSettings,
    ParameterGroup,
    check_parts,
    split_state,
)
from llava_kd.parallel.world import World


@dataclass(frozen=True, kw_only=True)
class Zero:
    """What DeepSpeed is told besides the optimiser: it clips by itself."""

    stage: int
    max_grad_norm: float
    micro_batch_size: int
    accumulation: int


class DeepSpeedEngine:
    """ZeRO over one module. DeepSpeed keeps fp32 masters and clips; the schedule stays the trainer's."""

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[ParameterGroup],
        *,
        world: World,
        zero: Zero,
        adamw: AdamWSettings,
        bf16: bool,
    ) -> None:
        self.world = world
        self.is_sharded = zero.stage == 3
        self._module = module
        self._trained = {name: module.get_parameter(name) for group in groups for name in group.names}
        self._lrs = [group.lr for group in groups]
        optimizer = torch.optim.AdamW(
            [{"params": [self._trained[name] for name in g.names], "lr": g.lr} for g in groups],
            betas=adamw.betas,
            eps=adamw.eps,
            weight_decay=adamw.weight_decay,
        )
        bucket = min(REDUCE_BUCKET, sum(p.numel() for p in self._trained.values()))
        self._engine: Any = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": zero.micro_batch_size,
                "gradient_accumulation_steps": zero.accumulation,
                "gradient_clipping": zero.max_grad_norm,
                "bf16": {"enabled": bf16},
                # DeepSpeed fills the whole buffer's memory, however little is trained.
                "zero_optimization": {"stage": zero.stage, "reduce_bucket_size": bucket},
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 10**12,
            },
        )[0]

        self._fill_moments(zero.stage)

    def _fill_moments(self, zero_stage: int) -> None:
        """Zero moments for every shard: DeepSpeed itself makes them at the first step, too late to load."""
        zero = self._engine.optimizer
        shards = (
            zero.fp32_partitioned_groups_flat if zero_stage == 3 else zero.single_partition_of_fp32_groups
        )
        for shard in shards:
            moments = {key: torch.zeros_like(shard) for key in STATE_KINDS[1:]}
            zero.optimizer.state[shard] = {"step": torch.tensor(0.0), **moments}
        if zero_stage < 3:
            zero._lazy_init_hp_params_optimizer_state()

    def forward(self, *args: Any, is_last: bool, **kwargs: Any) -> Any:
        self._engine.set_gradient_accumulation_boundary(is_last)
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        # ZeRO averages gradients over ranks; ours are shares of one global sum.
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(loss * self.world.size, scale_wrt_gas=False)

    @contextmanager
    def inference(self) -> Iterator[None]:
        with torch.no_grad():  # ZeRO-3's hooks stand on every module, so each gathers its own weights
            yield

    @contextmanager
    def whole(self, part: nn.Module) -> Iterator[dict[str, Tensor]]:
        named = dict(part.named_parameters())
        with deepspeed.zero.GatheredParameters(list(named.values()), enabled=self.is_sharded):
            yield {name: parameter.data for name, parameter in named.items()}

    def step(self, *, lr_multiplier: float, max_grad_norm: float) -> Tensor:
        for group, lr in zip(self._engine.optimizer.param_groups, self._lrs, strict=True):
            group["lr"] = lr * lr_multiplier
        self._engine.step()
        return torch.as_tensor(self._engine.get_global_grad_norm())

    def parameters(self) -> dict[str, Tensor]:
        whole: dict[str, Tensor] = {}
        for name, parameter in self._module.named_parameters():
            value = safe_get_full_fp32_param(parameter) if name in self._trained else None
            if value is None:
                with deepspeed.zero.GatheredParameters([parameter]):
                    value = parameter.detach().clone()
            if self.world.is_main:
                whole[name] = value.detach().cpu().clone()
        return whole

    def replicas(self) -> dict[str, Tensor]:
        return {} if self.is_sharded else dict(self._trained)

    def state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for name, parameter in self._trained.items():
            values = (
                safe_get_full_fp32_param(parameter),
                *(safe_get_full_optimizer_state(parameter, key) for key in STATE_KINDS[1:]),
            )
            if self.world.is_main:
                for kind, value in zip(STATE_KINDS, values, strict=True):
                    assert value is not None  # every trained parameter has a master and both moments
                    state[f"{kind}/{name}"] = value.detach().cpu().clone()
        return state

    def load_state(self, state: dict[str, Tensor], *, num_steps: int) -> None:
        check_parts(state, self._trained)
        for name, parameter in self._trained.items():
            values = [value.to(self.world.device) for value in split_state(state, name)]
            safe_set_full_fp32_param(parameter, values[0])
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
                parameter.copy_(values[0])  # the master was set above; this is what the forward reads
            for key, value in zip(STATE_KINDS[1:], values[1:], strict=True):
                safe_set_full_optimizer_state(parameter, value, key)
        for slots in self._engine.optimizer.optimizer.state.values():
            slots["step"] = torch.tensor(float(num_steps))
