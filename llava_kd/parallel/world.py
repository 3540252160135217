"""Ranks and devices of this run, from the variables that torchrun, deepspeed and Slurm wrappers set."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

# How the backends word it when a peer is gone.
_PEER_IS_GONE = (
    "closed by peer",
    "reset by peer",
    "broken pipe",
    "pair closure",
    "remote process exited",
    "communicator was aborted",
    "timed out waiting",
    "socket timeout",
    "failed to recv",
    "connection was likely closed",
)


class RankLostError(ConnectionError):
    """Another rank of this run is gone, so this one cannot go on."""


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

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run the block on every rank and wait for all; a ValueError or OSError on one stops every rank.

        Without it the others would wait for a rank that has left already.
        """
        error: ValueError | OSError | None = None
        try:
            yield
        except (ValueError, OSError) as caught:
            error = caught
        failed = self.sum(torch.tensor([float(error is not None)], device=self.device))
        if error is not None:
            raise error
        if float(failed) > 0:
            raise ValueError(f"rank {self.rank} stops because another rank did; that rank's message says why")

    def agreed(self, value: int, what: str) -> int:
        """`value`, the same on every rank. Raises ValueError on all of them if it is not."""
        if self.size == 1:
            return value
        extremes = torch.tensor([value, -value], device=self.device)
        dist.all_reduce(extremes, dist.ReduceOp.MAX)
        highest, lowest = int(extremes[0]), -int(extremes[1])
        if highest != lowest:
            raise ValueError(
                f"every rank must get the same {what}, got from {lowest} to {highest}; output_dir must be on "
                "a file system that all machines share"
            )
        return value

    def agreed_names(self, names: Collection[str], what: str) -> tuple[str, ...]:
        """`names`, sorted. Raises ValueError on every rank where they differ: which rank lacks which."""
        if self.size == 1:
            return tuple(sorted(names))
        of_ranks: list[set[str]] = [set() for _ in range(self.size)]
        dist.all_gather_object(of_ranks, set(names))
        everything = set().union(*of_ranks)
        if lacking := {
            rank: sorted(everything - own) for rank, own in enumerate(of_ranks) if everything - own
        }:
            listed = "; ".join(f"rank {rank} lacks {', '.join(lost)}" for rank, lost in lacking.items())
            raise ValueError(
                f"every rank must report the same {what}, but {listed}. Report it on every rank, as zero "
                "where a batch has nothing for it"
            )
        return tuple(sorted(everything))


def join(device: str = "auto", *, timeout_minutes: float = 60) -> World:
    """Join the process group that the launcher describes, or be alone.

    `device` is `auto`, `cpu` or `cuda`. A collective that waits longer than the timeout ends the run. Raises
    ValueError for `cuda` on a machine without it, for ranks that do not fit, and for a port that is in use.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"engine.device must be auto, cpu or cuda; got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("engine.device is cuda but no CUDA device is visible; use auto or cpu")
    use_cuda = device != "cpu" and torch.cuda.is_available()
    size, rank = _whole_number("WORLD_SIZE", 1), _whole_number("RANK", 0)
    if rank >= size:
        raise ValueError(f"RANK must be below WORLD_SIZE; got {rank} of {size}: every process has its own")
    if size > 1 and (missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]):
        raise ValueError(
            f"WORLD_SIZE is {size} but {' and '.join(missing)} is not set; start with torchrun or deepspeed, "
            "or unset WORLD_SIZE for one process"
        )
    place = torch.device("cpu")
    if use_cuda:
        place = torch.device("cuda", _local_rank())
        torch.cuda.set_device(place)
    if size > 1 and not dist.is_initialized():
        try:
            dist.init_process_group(
                "nccl" if use_cuda else "gloo",
                device_id=place if use_cuda else None,
                timeout=timedelta(minutes=timeout_minutes),
            )
        except dist.DistNetworkError as error:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise ValueError(
                f"rank {rank} cannot open {address}: {str(error).splitlines()[0]}; set MASTER_PORT to a free "
                "port, and MASTER_ADDR to the first machine"
            ) from error
    return World(rank=rank, size=size, device=place)


def _local_rank() -> int:
    local, visible = _whole_number("LOCAL_RANK", 0), torch.cuda.device_count()
    if local >= visible:
        raise ValueError(
            f"local rank {local} has no GPU: {visible} are visible here; start one process a GPU (NPROC)"
        )
    return local


def _whole_number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ValueError(f"the variable {name} must be a whole number; got {text!r}")
    return int(text)


@contextmanager
def peers() -> Iterator[None]:
    """Leave the process group at the end; say in one line that a rank is gone where that ended the block."""
    try:
        yield
    except RuntimeError as error:
        if dist.is_initialized() and any(words in str(error).lower() for words in _PEER_IS_GONE):
            rank = dist.get_rank()
            raise RankLostError(
                f"rank {rank} stops: another rank is gone ({str(error).splitlines()[0][:300]}). Its own "
                "message, or the machine's log, says why; the same command resumes from the last checkpoint"
            ) from error
        raise
    leave()


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
