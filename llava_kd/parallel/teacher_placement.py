"""Where the frozen teacher's weights are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from llava_kd.parallel.world import World


def shard_layers(decoder: nn.Module, layers: Sequence[nn.Module], world: World, dtype: torch.dtype) -> None:
    """Spread each layer of a decoder over the ranks, one at a time onto the device; it is gathered to run.

    Every rank must call the model equally often. Embeddings, head and tower are left to the caller: losses
    read the head outside the model. On one rank nothing is done.
    """
    if world.size == 1:
        return
    mesh = init_device_mesh(world.device.type, (world.size,))
    for layer in layers:
        layer.to(world.device, dtype)
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    # Under one root a layer is gathered while the one before it computes; with a root each they take turns.
    sharded = {parameter for layer in layers for parameter in layer.parameters()}
    fully_shard(decoder, mesh=mesh, ignored_params=set(decoder.parameters()) - sharded)


def offload_layers(layers: Sequence[nn.Module], device: torch.device, dtype: torch.dtype) -> None:
    """Keep each layer on the CPU, in pinned memory beside a GPU, and copy it to the device while it runs.

    For weights that never change: what was copied is dropped and not written back.
    """
    for layer in layers:
        layer.to("cpu", dtype)
        visitor = _Visitor(layer, device)
        layer.register_forward_pre_hook(visitor.bring)
        layer.register_forward_hook(visitor.send_home, always_call=True)


class _Visitor:
    """Tensors of a layer, and where they live."""

    def __init__(self, layer: nn.Module, device: torch.device) -> None:
        self._device = device
        self._homes: list[tuple[Tensor, Tensor]] = []
        for tensor in (*layer.parameters(), *layer.buffers()):
            if device.type == "cuda":
                tensor.data = tensor.data.pin_memory()
            self._homes.append((tensor, tensor.data))

    def bring(self, *_: object) -> None:
        for tensor, home in self._homes:
            tensor.data = home.to(self._device, non_blocking=True, copy=True)

    def send_home(self, *_: object) -> None:
        for tensor, home in self._homes:
            tensor.data = home
