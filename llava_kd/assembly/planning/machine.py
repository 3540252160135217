"""What this machine has: cores, memory, GPUs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Gpu:
    name: str
    memory: int  # bytes


@dataclass(frozen=True, kw_only=True)
class Machine:
    """`memory` is what is free for one process, in bytes, within the limit of its container."""

    cores: int
    memory: int
    gpus: tuple[Gpu, ...] = ()

    @staticmethod
    def here() -> Machine:
        return Machine(cores=_cores(), memory=_free_memory(), gpus=_gpus())

    @property
    def device_memory(self) -> int:
        """Bytes of the smallest GPU; without one, of the machine."""
        return min((gpu.memory for gpu in self.gpus), default=self.memory)

    def __str__(self) -> str:
        names = [f"{gpu.name} ({gpu.memory / GB:.0f} GB)" for gpu in self.gpus]
        found = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)) or "no GPU"
        return f"{found}, {self.cores} CPU cores, {self.memory / GB:.0f} GB of memory free"


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _free_memory() -> int:
    """Of the system, or what a control group leaves where that is less."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in _text("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit, used = _text("/sys/fs/cgroup/memory.max").strip(), _text("/sys/fs/cgroup/memory.current").strip()
    if limit.isdecimal() and used.isdecimal():
        free = min(free, max(0, int(limit) - int(used)))
    return free


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _gpus() -> tuple[Gpu, ...]:
    import torch  # late: only this needs it

    if not torch.cuda.is_available():
        return ()
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return tuple(Gpu(name=gpu.name, memory=gpu.total_memory) for gpu in found)
