"""Ranks and devices of this run, from the variables that torchrun, deepspeed and Slurm wrappers set."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class World:
    """One process among `size`; collectives are no-ops where there is only one."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks, in the dtype of `values`."""
        if self.size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def join(device: str = "auto") -> World:
    """Join the process group that the launcher describes, or be alone.

    `device` is `auto`, `cpu` or `cuda`. Raises ValueError for `cuda` on a machine without it.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"engine.device must be auto, cpu or cuda; got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("engine.device is cuda but no CUDA device is visible; use auto or cpu")
    use_cuda = device != "cpu" and torch.cuda.is_available()
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    place = torch.device("cpu")
    if use_cuda:
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(place)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if use_cuda else "gloo", device_id=place if use_cuda else None)
    return World(rank=rank, size=size, device=place)


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
