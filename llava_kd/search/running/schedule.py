"""Jobs that wait for others, on so many slots; one that fails takes along what needs it, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Protocol, TypeVar


@dataclass(frozen=True, kw_only=True)
class Job:
    """`name` says it to people. It is done where `is_done` says so, whatever its process says."""

    key: str
    name: str
    needs: tuple[str, ...]
    command: tuple[str, ...]
    log: Path
    is_done: Callable[[], bool]


Process = TypeVar("Process")


class Processes(Protocol[Process]):
    """What starts jobs: `slot` is the core or device that a job gets; `ended` gives its exit status."""

    def start(self, job: Job, slot: int) -> Process: ...

    def ended(self, process: Process) -> int | None: ...

    def is_stopping(self) -> bool: ...


@dataclass(kw_only=True)
class Outcome:
    """Keys of jobs: finished before or now; failed, and why; not run because of another, and of which."""

    done: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)
    is_stopped: bool = False

    def settled(self) -> set[str]:
        return {*self.done, *self.failed, *self.not_run}


@dataclass(frozen=True, kw_only=True)
class _Running(Generic[Process]):
    job: Job
    process: Process
    slot: int
    since: float


def run_jobs(
    jobs: Sequence[Job],
    processes: Processes[Process],
    *,
    num_slots: int,
    finished: Callable[[Job, float, Outcome], None],
    failed: Callable[[Job, str], None],
    pause: float = 0.05,
) -> Outcome:
    """Run what is not done, those whose needs are met in the order given. `finished` hears the seconds.

    Once a stop is asked for nothing is started, and those that run are waited for.
    """
    outcome = Outcome(done={job.key for job in jobs if job.is_done()})
    waiting = [job for job in jobs if job.key not in outcome.done]
    running: list[_Running[Process]] = []
    while True:
        waiting = _without_broken(waiting, outcome)
        free = [slot for slot in range(num_slots) if slot not in {run.slot for run in running}]
        ready = [job for job in waiting if outcome.done.issuperset(job.needs)]
        if not processes.is_stopping():
            for job, slot in zip(ready, free, strict=False):
                process = processes.start(job, slot)
                running.append(_Running(job=job, process=process, slot=slot, since=time.monotonic()))
                waiting.remove(job)
        if not running:
            outcome.is_stopped = bool(waiting)
            return outcome
        time.sleep(pause)
        for run in list(running):
            status = processes.ended(run.process)
            if status is None:
                continue
            running.remove(run)
            if run.job.is_done():
                outcome.done.add(run.job.key)
                finished(run.job, time.monotonic() - run.since, outcome)
            elif processes.is_stopping():
                outcome.is_stopped = True
            else:
                outcome.failed[run.job.key] = why(run.job, status)
                failed(run.job, outcome.failed[run.job.key])


def _without_broken(waiting: list[Job], outcome: Outcome) -> list[Job]:
    """Those that may still run; the others are noted with the failure at the root."""
    kept = []
    for job in waiting:  # parents come before their children
        broken = next((key for key in job.needs if key in outcome.failed or key in outcome.not_run), None)
        if broken is None:
            kept.append(job)
        else:
            outcome.not_run[job.key] = outcome.not_run.get(broken, broken)
    return kept


def why(job: Job, status: int) -> str:
    """One line for a job that ended without being done."""
    how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    if status == 0:
        how = "stopped before it finished"
    said = last_line(job.log)
    return f"{how}{f': {said}' if said else ''} ({job.log})"


def last_line(log: Path) -> str:
    """The last words of a log; nothing where it is not there."""
    if not log.is_file():
        return ""
    with log.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(max(0, size - 4096))
        lines = stream.read().decode("utf-8", errors="replace").splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    return lines[-1][:400] if lines else ""
