"""A stop from outside, where there is nothing to save; and ranks that end with their launcher."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
INTERRUPTED = 130  # what a shell reports for Ctrl-C
SUPERVISOR = "LLAVA_KD_SUPERVISOR"  # path of the socket of `supervise`, in the environment of its ranks
_GRACE_S = 3.0
_told_by_supervisor = False


def status_after(number: int) -> int:
    """A preempted run is no failure: the same command goes on. A supervisor knows itself what it was sent."""
    return INTERRUPTED if number == signal.SIGINT and not _told_by_supervisor else 0


def status_of_rest(number: int) -> int:
    """Of a command of several runs that a signal stopped before the last: what a shell reports for it.

    What stands behind it in a script waits for all of them, so it must not pass for done.
    """
    return 128 + number


@contextmanager
def stoppable() -> Iterator[None]:
    """Outside the loop, which saves first, a signal that asks for a stop ends the process with one line.

    The handler of Python runs between two of its instructions, and a library may swallow what it raises. So
    a thread reads from a pipe that signals are told to at once, and ends the process where it has not ended
    soon: in a rendezvous, say, that other ranks never come to. A library that is interrupted between taking
    something and giving it back may also raise an error of its own instead, which says nothing to a user.
    """
    told: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        told.append(number)
        _say(number)
        if _was_launched_with_others():
            # Nobody may be left to take leave of: to end Python with a group that others have left can abort.
            os._exit(_status_of_rank(number))
        raise SystemExit(status_after(number))

    def watch() -> None:
        while number := os.read(reader, 1):
            # In the loop another handler is in place, which notes the stop; a step may take longer.
            if number[0] in STOPS and signal.getsignal(number[0]) is stop:
                time.sleep(_GRACE_S)
                if signal.getsignal(number[0]) is stop:
                    os._exit(_status_of_rank(number[0]))
        os.close(reader)

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    previous = {number: signal.signal(number, stop) for number in STOPS}
    threading.Thread(target=watch, name="stop-watch", daemon=True).start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)  # whatever the parent blocked
    try:
        _obey()
        yield
    except BaseException:  # also SystemExit: whatever the signal has caused, its status is the answer
        if told:
            raise SystemExit(status_after(told[0])) from None
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before)
        os.close(writer)


def end_with_torchrun() -> None:
    """As a rank of a torchrun that no script supervises: end when it ends."""
    if SUPERVISOR in os.environ or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="torchrun-watch", daemon=True).start()


def was_told() -> bool:
    """Whether this rank's supervisor has been asked to stop; waits a moment for the word to come."""
    deadline = time.monotonic() + 1.0
    while not _told_by_supervisor and SUPERVISOR in os.environ and time.monotonic() < deadline:
        time.sleep(0.02)
    return _told_by_supervisor


def _status_of_rank(number: int) -> int:
    """Of one that a launcher started and that was told alone: no 0, or the launcher lets the others wait."""
    is_supervised = SUPERVISOR in os.environ and _was_launched_with_others()
    return status_of_rest(number) if is_supervised and not was_told() else status_after(number)


def _was_launched_with_others() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _say(number: int) -> None:
    line = (
        f"stopped by {signal.Signals(number).name} outside of any step; run the same command again to "
        "continue\n"
    )
    with suppress(OSError):  # past Python's buffer, which whatever was interrupted may be writing to
        os.write(2, line.encode())


def _obey() -> None:
    """As a rank of `supervise`: take signals from it, and end with it. ConnectionError if it is gone."""
    path = os.environ.get(SUPERVISOR)
    if path is None:
        return
    supervisor = socket.socket(socket.AF_UNIX)
    try:
        supervisor.connect(path)
    except OSError as error:
        raise ConnectionError(f"the launcher of this rank is gone ({path}: {error.strerror})") from error

    def listen() -> None:
        global _told_by_supervisor
        with suppress(OSError):
            while number := supervisor.recv(1):
                _told_by_supervisor = True
                os.kill(os.getpid(), number[0])
        shutil.rmtree(Path(path).parent, ignore_errors=True)  # what it could not remove if it was killed
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=listen, name="supervisor", daemon=True).start()
