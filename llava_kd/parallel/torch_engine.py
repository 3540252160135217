"""PyTorch's own engines: one device, DDP, and FSDP2 (`fully_shard`)."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from llava_kd.parallel.engine import STATE_KINDS, AdamWSettings, ParameterGroup, check_parts, split_state
from llava_kd.parallel.world import World

EngineKind = Literal["single", "ddp", "fsdp2"]


class TorchEngine:
    """fp32 parameters; with `bf16`, autocast (single, DDP) or a mixed-precision policy (FSDP2)."""

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[ParameterGroup],
        *,
        world: World,
        kind: EngineKind,
        adamw: AdamWSettings,
        bf16: bool,
        shard_units: Sequence[nn.Module] = (),
    ) -> None:
        """`shard_units`: modules that FSDP2 gathers one at a time, such as decoder layers, inner ones first.

        Raises ValueError for `single` on several ranks.
        """
        if kind == "single" and world.size > 1:
            raise ValueError(f"engine.kind is single but {world.size} processes run; use ddp or fsdp2")
        self.world = world
        self._module = module
        self.is_sharded = kind == "fsdp2"
        self._autocast = bf16 and kind != "fsdp2"
        self._gathered_as = torch.bfloat16 if bf16 and kind == "fsdp2" else None
        if kind == "fsdp2":
            _shard(module, shard_units, world, bf16)
        self._wrapped: nn.Module = module
        if kind == "ddp":
            self._wrapped = _data_parallel(module)
        # FSDP2 puts new parameter objects in place, so they are looked up after wrapping.
        self._trained = {name: module.get_parameter(name) for group in groups for name in group.names}
        self._lrs = [group.lr for group in groups]
        self._optimizer = torch.optim.AdamW(
            [{"params": [self._trained[name] for name in g.names], "lr": g.lr} for g in groups],
            betas=adamw.betas,
            eps=adamw.eps,
            weight_decay=adamw.weight_decay,
            fused=True,
        )

    def forward(self, *args: Any, is_last: bool, **kwargs: Any) -> Any:
        if isinstance(self._wrapped, FSDPModule):
            self._wrapped.set_requires_gradient_sync(is_last)
        with self._exchange(is_last), torch.autocast(self.world.device.type, torch.bfloat16, self._autocast):
            return self._wrapped(*args, **kwargs)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        # DDP and FSDP average gradients over ranks; ours are shares of one global sum.
        with self._exchange(is_last):
            (loss * self.world.size).backward()

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        # Units gather themselves when they are called; what the root owns (embeddings, head) does not.
        root = self._wrapped if isinstance(self._wrapped, FSDPModule) else None
        if root is not None:
            root.unshard()
        try:
            with torch.no_grad(), torch.autocast(self.world.device.type, torch.bfloat16, self._autocast):
                yield
        finally:
            if root is not None:
                root.reshard()

    @contextlib.contextmanager
    def whole(self, part: nn.Module) -> Iterator[dict[str, Tensor]]:
        # Gathered one by one, in the type that FSDP computes with: nothing of its own is touched, so this may
        # come before a first forward too.
        with torch.no_grad():
            weights = {name: self._gathered(p) for name, p in part.named_parameters()}
        yield weights
        weights.clear()

    def _gathered(self, parameter: Tensor) -> Tensor:
        if not isinstance(parameter, DTensor):
            return parameter.detach()
        computed = parameter.to(self._gathered_as or parameter.dtype)
        assert isinstance(computed, DTensor)
        return computed.full_tensor()

    def _exchange(self, is_last: bool) -> contextlib.AbstractContextManager:
        if isinstance(self._wrapped, DistributedDataParallel) and not is_last:
            return self._wrapped.no_sync()
        return contextlib.nullcontext()

    def step(self, *, lr_multiplier: float, max_grad_norm: float) -> Tensor:
        parameters = self._trained.values()
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
        for group, lr in zip(self._optimizer.param_groups, self._lrs, strict=True):
            group["lr"] = lr * lr_multiplier
        self._optimizer.step()
        # DDP's gradients are views of its buckets: without them micro-batches would be summed beside these.
        self._optimizer.zero_grad(set_to_none=not isinstance(self._wrapped, DistributedDataParallel))
        return norm

    def parameters(self) -> dict[str, Tensor]:
        return {n: t for n, p in self._module.named_parameters() if (t := self._whole(p)) is not None}

    def replicas(self) -> dict[str, Tensor]:
        return {} if self.is_sharded else dict(self._trained)

    def state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for name, parameter in self._trained.items():
            slots = self._optimizer.state[parameter]
            moments = [slots.get(key, torch.zeros_like(parameter)) for key in ("exp_avg", "exp_avg_sq")]
            for kind, tensor in zip(STATE_KINDS, (parameter, *moments), strict=True):
                whole = self._whole(tensor)
                if whole is not None:
                    state[f"{kind}/{name}"] = whole
        return state

    def load_state(self, state: dict[str, Tensor], *, num_steps: int) -> None:
        check_parts(state, self._trained)
        for name, parameter in self._trained.items():
            values = [_like(parameter, value) for value in split_state(state, name)]
            with torch.no_grad():
                parameter.copy_(values[0])
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(num_steps), device=self.world.device),
                "exp_avg": values[1],
                "exp_avg_sq": values[2],
            }

    def _whole(self, tensor: Tensor) -> Tensor | None:
        """The whole tensor on the CPU of rank 0; a collective where it is sharded."""
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return whole.detach().cpu().clone() if self.world.is_main else None


def _shard(module: nn.Module, units: Sequence[nn.Module], world: World, bf16: bool) -> None:
    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for unit in (*units, module):
        fully_shard(unit, mesh=mesh, mp_policy=policy)


def _like(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """`value` with the device, dtype and sharding of `parameter`."""
    value = value.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value.clone()


def _data_parallel(module: nn.Module) -> DistributedDataParallel:
    """DDP that leaves buffers alone at each forward, by the name that this torch has for it."""
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    settings: dict[str, Any] = {"gradient_as_bucket_view": True}
    settings["forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"] = False
    return DistributedDataParallel(module, **settings)
