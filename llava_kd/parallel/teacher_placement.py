"""Where the frozen teacher's weights are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from llava_kd.parallel.world import World


def shard_layers(layers: Sequence[nn.Module], world: World, dtype: torch.dtype) -> None:
    """Spread each layer over the ranks, one at a time onto the device; it is gathered while it runs.

    Every rank must call the model equally often. Embeddings, head and tower are left to the caller: losses
    read the head outside the model. On one rank nothing is done.
    """
    if world.size == 1:
        return
    mesh = init_device_mesh(world.device.type, (world.size,))
    for layer in layers:
        layer.to(world.device, dtype)
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
