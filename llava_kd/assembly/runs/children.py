"""Processes that this one starts, asks to stop when it is asked itself, and does not leave behind."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from llava_kd.assembly.runs.stopping import INTERRUPTED, STOPS
from llava_kd.assembly.runs.supervise import end_with_parent


class Children:
    """Signals that ask for a stop go to every child, which saves first, and no other one starts.

    Of one main thread alone: the system ends a child with the thread that started it.
    """

    def __init__(self) -> None:
        self.asked: list[int] = []
        self._running: list[subprocess.Popen] = []
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Children:
        self._previous = {number: signal.signal(number, self._receive) for number in STOPS}
        return self

    def __exit__(self, *_: object) -> None:
        self._end_all()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self.asked.append(number)
        for process in self._running:
            process.send_signal(number)

    def run(self, command: Sequence[str]) -> int:
        """Exit status of a child on this terminal; 0 without a start where a stop has been asked for."""
        if self.asked:
            return 0
        with subprocess.Popen(command, preexec_fn=end_with_parent()) as process:
            self._running.append(process)
            try:
                if self.asked:  # while it started
                    process.send_signal(self.asked[0])
                return process.wait()
            finally:
                self._running.remove(process)

    def start(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen:
        """A child beside others, in a process group of its own: Ctrl-C reaches it once. See `ended`."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as stream:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                process_group=0,
                preexec_fn=end_with_parent(),
            )
        self._running.append(process)
        if self.asked:  # while it started
            process.send_signal(self.asked[0])
        return process

    def ended(self, process: subprocess.Popen) -> int | None:
        """Exit status of a child that `start` gave; None while it runs."""
        status = process.poll()
        if status is not None and process in self._running:
            self._running.remove(process)
        return status

    def _end_all(self) -> None:
        """Kill what still runs: after a fault of this process, which leaves nobody to ask them."""
        for process in list(self._running):
            process.kill()
            process.wait()
        self._running.clear()

    def explained(self, status: int) -> signal.Signals | None:
        """The signal that ended a child, which may have been too young to answer it; None if none did."""
        if status == INTERRUPTED and not self.asked:
            return signal.SIGINT  # it was sent to the child alone
        ends = {0, INTERRUPTED, *(-number for number in STOPS), *(128 + number for number in STOPS)}
        return signal.Signals(self.asked[0]) if self.asked and status in ends else None
