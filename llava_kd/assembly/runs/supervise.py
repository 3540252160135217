"""`python -m llava_kd.assembly.runs.supervise LAUNCHER ...`: pass stops to its ranks, leave nobody behind.

torchrun and deepspeed answer a signal by killing their ranks after 30 seconds at most, and a checkpoint may
take longer. So the launcher gets a session of its own, where no signal of the terminal reaches it. Each rank
connects to a socket here instead (see `stopping`): a byte that comes through it is the number of a signal,
and its end is the end of the rank. The system closes the socket however this process ends.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from llava_kd.assembly.runs.stopping import INTERRUPTED, STOPS, SUPERVISOR

_PR_SET_PDEATHSIG = 1
_LEAVE_S = 30.0  # how long a killed rank may take until its memory is back


class Overseer:
    """The socket that ranks connect to; `environment` is what leads them there."""

    def __init__(self) -> None:
        # Not below TMPDIR: the path of a socket may have some 100 characters.
        short = "/tmp" if os.access("/tmp", os.W_OK) else None
        self._directory = Path(tempfile.mkdtemp(prefix="llava-kd-", dir=short))
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self._directory / "socket"))
        self._listener.listen(1024)
        self.environment = {**os.environ, SUPERVISOR: str(self._directory / "socket")}
        self._lock = threading.RLock()  # a handler of a signal may run while the main thread holds it
        self._ranks: list[socket.socket] = []
        self._told: int | None = None
        threading.Thread(target=self._accept, daemon=True).start()

    def tell(self, number: int) -> bool:
        """Pass a signal on, also to those that come later. False if nobody has come so far."""
        with self._lock:
            self._told = number
            for rank in self._ranks:
                _send(rank, number)
            return bool(self._ranks)

    def close(self) -> None:
        """Wait until every rank is gone; those that were not asked to stop, and so to save, end at once."""
        with self._lock:
            self._listener.close()
            shutil.rmtree(self._directory, ignore_errors=True)
            ranks = list(self._ranks)
        for rank in ranks:
            with suppress(OSError):
                if self._told is None:
                    rank.settimeout(_LEAVE_S)
                    rank.shutdown(socket.SHUT_WR)
                rank.recv(1)

    def _accept(self) -> None:
        while True:
            try:
                rank, _ = self._listener.accept()
            except OSError:
                return  # closed
            with self._lock:
                self._ranks.append(rank)
                if self._told is not None:
                    _send(rank, self._told)


def _send(rank: socket.socket, number: int) -> None:
    with suppress(OSError):  # it may be gone
        rank.send(bytes([number]))


def end_with_parent() -> Callable[[], None] | None:
    """On Linux, as `preexec_fn`: the child is killed with the thread that starts it; use the main one.

    Elsewhere a launcher lives until it sees that its ranks are gone.
    """
    if sys.platform != "linux":
        return None
    import ctypes

    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def before_exec() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != parent:
            os._exit(1)  # it ended before the line above

    return before_exec


def supervise(command: Sequence[str]) -> int:
    """Exit status of `command`; 0 after a stop, and 130 after Ctrl-C."""
    asked: list[int] = []
    launcher: subprocess.Popen | None = None
    overseer = Overseer()
    nobody_came = False

    def stop(number: int) -> None:
        nonlocal nobody_came
        if launcher is not None and not overseer.tell(number):
            nobody_came = True  # then; one that comes before the launcher is gone is told to stop as it comes
            with suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)  # no rank has come, so there is nothing to save

    def receive(number: int, _frame: FrameType | None) -> None:
        asked.append(number)
        stop(number)

    for number in STOPS:
        signal.signal(number, receive)
    try:
        launcher = subprocess.Popen(
            command, env=overseer.environment, start_new_session=True, preexec_fn=end_with_parent()
        )
        if asked:  # while it started
            stop(asked[0])
        status = launcher.wait()
    except OSError as error:
        print(f"{command[0]} cannot be started: {error.strerror}", file=sys.stderr, flush=True)
        return 127
    finally:
        overseer.close()
    if not asked:
        return status if status >= 0 else 128 - status
    name = signal.Signals(asked[0]).name
    if status == -signal.SIGKILL and nobody_came:
        print(
            f"stopped by {name} before any rank started; run the same command again to continue",
            file=sys.stderr,
            flush=True,
        )
        status = 0
    if status == 0:
        return INTERRUPTED if asked[0] == signal.SIGINT else 0
    return status if status > 0 else 128 - status


if __name__ == "__main__":
    sys.exit(supervise(sys.argv[1:]))
