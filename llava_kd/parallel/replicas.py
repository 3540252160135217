"""Whether the ranks still hold the same trained weights, where each of them holds them whole.

Shape legend: R ranks, P parameters, N numbers of a chunk.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from llava_kd.parallel.world import World

_CHUNK = 1 << 20  # numbers; they are widened to eight bytes each
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FACTOR = 6364136223846793005  # of Knuth's MMIX generator; odd, as all factors are, so that no bit is lost


def check_replicas(world: World, weights: Mapping[str, Tensor]) -> None:
    """ValueError on every rank where one holds other `weights` than rank 0: which rank, and where.

    Every rank passes the same names in the same order. One checksum a parameter travels, no weight.
    """
    if world.size == 1 or not weights:
        return
    own_P = torch.stack([bits_sum(weight.detach()) for weight in weights.values()])
    of_ranks = [torch.empty_like(own_P) for _ in range(world.size)]
    dist.all_gather(of_ranks, own_P)
    sums_RP = torch.stack(of_ranks).cpu()
    differs_RP = sums_RP != sums_RP[0]
    if not bool(differs_RP.any()):
        return
    names = list(weights)
    told = []
    for rank in differs_RP.any(1).nonzero().flatten().tolist():
        found = [names[p] for p in differs_RP[rank].nonzero().flatten().tolist()]
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        told.append(f"rank {rank} in {', '.join(found[:3])}{more} of {len(names)}")
    raise ValueError(
        f"the ranks' trained weights must be the same, but differ from those of rank 0: {'; '.join(told)}; "
        "nothing of this step was saved. Look for a faulty device, or a plug-in that treats ranks "
        "differently; the same command resumes from the last checkpoint, where they are equal"
    )


def bits_sum(tensor: Tensor) -> Tensor:
    """A checksum of the bits of a tensor, on its device: each number's bits times a factor of its place.

    Products and sums wrap at 64 bits, so a chunk's sum does not depend on its order.
    """
    bits_N = tensor.contiguous().flatten().view(_BITS[tensor.element_size()])
    factors_N = torch.arange(min(len(bits_N), _CHUNK), device=tensor.device) * 2 + 1
    factors_N *= _FACTOR
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for chunk_N in bits_N.split(_CHUNK):
        total = total * _FACTOR + (chunk_N * factors_N[: len(chunk_N)]).sum()
    return total
