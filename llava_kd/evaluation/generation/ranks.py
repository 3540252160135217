"""Which part of the questions this process answers, under torchrun or alone."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def device(self, device: str | None) -> torch.device:
        """The given device; by default this rank's GPU where there is one, else the CPU."""
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda":
            return torch.device("cuda", self.local_rank % max(torch.cuda.device_count(), 1))
        return torch.device(device)


def join_ranks() -> Ranks:
    """The ranks that torchrun started, joined by gloo for barriers only; one rank without torchrun."""
    world_size, local_rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    if world_size == 1:
        return Ranks()
    if torch.cuda.is_available():  # else what asks for "the" GPU would take memory of the first on every rank
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    if not dist.is_initialized():
        # Ranks finish their parts at different times: the barrier waits for the slowest.
        dist.init_process_group("gloo", timeout=datetime.timedelta(hours=24))
    return Ranks(dist.get_rank(), world_size, local_rank)
