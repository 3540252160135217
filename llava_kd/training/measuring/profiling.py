"""A trace of some steps by PyTorch's profiler, around the loop and not in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from llava_kd.batch import Batch
from llava_kd.durable import write_text
from llava_kd.training.trainer import Loader

_ROWS = 40  # of the table of operators
_MEMORY_EVENTS = 200_000  # that a snapshot holds


class Profiled:
    """A loader that has the steps `first` to `last`, counted from 1, traced from their first data on.

    Into `directory`: `trace-rank0.json.gz`, for Perfetto or chrome://tracing; `operators-rank0.txt`, what
    took the time; on a GPU `memory-rank0.pickle` too, for pytorch.org/memory_viz.
    """

    def __init__(
        self, loader: Loader, directory: Path, *, steps: tuple[int, int], device: torch.device, rank: int,
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._loader, self._directory, self._device, self._say = loader, directory, device, say
        self._first, self._last = steps
        self._rank = rank
        self._running: profile | None = None

    def telemetry(self) -> dict[str, float]:
        return self._loader.telemetry()

    def batches(self, first_step: int, last_step: int) -> Iterator[list[Batch]]:
        if first_step >= self._last:
            self._say(f"steps {self._first} to {self._last} are done already: none is profiled")
        groups = self._loader.batches(first_step, last_step)
        try:
            for step in range(first_step + 1, last_step + 1):
                if self._first <= step <= self._last and self._running is None:
                    self._start()
                yield next(groups)
                if step == self._last:
                    self._stop()
        finally:
            self._stop()

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
        self._running = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._running.__enter__()

    def _stop(self) -> None:
        if self._running is None:
            return
        running, self._running = self._running, None
        running.__exit__(None, None, None)
        self._directory.mkdir(parents=True, exist_ok=True)
        if self._device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(self._directory / f"memory-rank{self._rank}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        running.export_chrome_trace(str(self._directory / f"trace-rank{self._rank}.json.gz"))
        order = f"self_{self._device.type}_time_total"
        table = running.key_averages().table(sort_by=order, row_limit=_ROWS)
        write_text(self._directory / f"operators-rank{self._rank}.txt", table)
        self._say(f"profile of steps {self._first} to {self._last}: {self._directory}")
