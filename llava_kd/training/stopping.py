"""Signals that ask a run to stop after a checkpoint."""

from __future__ import annotations

import signal
from types import FrameType


class StopRequest:
    """Set by SIGTERM, SIGINT or SIGUSR1; read once a step so that every rank stops at the same one."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        # A process inherits what its parent blocks, such as a fork server that blocks them for its workers.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal() itself returned

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
