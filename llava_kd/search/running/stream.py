"""Jobs that are thought of one by one, as slots get free; one that runs may be asked to end."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from llava_kd.search.running.schedule import Job, Processes, why

Process = TypeVar("Process")


class StoppableProcesses(Processes[Process], Protocol[Process]):
    def stop(self, process: Process) -> None:
        """Ask one to save and end."""
        ...


class Watcher(Protocol):
    """Who thinks of jobs, and hears of them."""

    def next(self) -> Job | None:
        """None: nothing more, or nothing now while others run."""
        ...

    def is_hopeless(self, job: Job) -> bool:
        """Asked again and again while it runs."""
        ...

    def ended(self, job: Job, seconds: float, failure: str | None, *, was_asked: bool) -> None:
        """`failure` is None for one that is done; `was_asked`: it was hopeless and has been stopped."""
        ...


@dataclass(kw_only=True)
class _Running(Generic[Process]):
    job: Job
    process: Process
    slot: int
    since: float
    was_asked: bool = False


def run_stream(
    watcher: Watcher, processes: StoppableProcesses[Process], *, num_slots: int, pause: float = 0.05
) -> bool:
    """Until nothing comes and nothing runs. True where a stop was asked for.

    Then nothing starts any more, what runs is waited for, and `ended` hears nothing of what was broken off.
    """
    running: list[_Running[Process]] = []
    while True:
        while len(running) < num_slots and not processes.is_stopping():
            job = watcher.next()
            if job is None:
                break
            slot = min(set(range(num_slots)) - {run.slot for run in running})
            process = processes.start(job, slot)
            running.append(_Running(job=job, process=process, slot=slot, since=time.monotonic()))
        if not running:
            return processes.is_stopping()
        time.sleep(pause)
        for run in list(running):
            status = processes.ended(run.process)
            if status is None:
                if not run.was_asked and watcher.is_hopeless(run.job):
                    run.was_asked = True
                    processes.stop(run.process)
                continue
            running.remove(run)
            seconds = time.monotonic() - run.since
            if run.job.is_done():
                watcher.ended(run.job, seconds, None, was_asked=False)
            elif not processes.is_stopping() or run.was_asked:
                watcher.ended(run.job, seconds, why(run.job, status), was_asked=run.was_asked)
