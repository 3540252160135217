"""Processes that read records: no signal of the terminal reaches them, and they end with the one they serve.

A stop is for the trainer, which still wants every micro-batch of its step and then closes its workers. They
and their fork server are in its process group, so that Ctrl-C and `kill -- -PGID` signal them too.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing import forkserver, popen_forkserver, resource_tracker
from multiprocessing.context import BaseContext, ForkServerContext, ForkServerProcess
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import Dataset

_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class _Popen(popen_forkserver.Popen):
    def terminate(self) -> None:
        self.kill()  # SIGTERM is one of those that are blocked


class _Worker(ForkServerProcess):
    @staticmethod
    def _Popen(process_obj: BaseProcess) -> _Popen:
        return _Popen(process_obj)


class _WorkerContext(ForkServerContext):
    Process = _Worker


def worker_context(*preload: str) -> BaseContext:
    """What starts workers, from a fork server that has imported `preload` and blocks the signals of a stop.

    Blocked before it starts, so that there is no moment at which it, or a worker, could die of one.
    """
    workers = _WorkerContext()
    workers.set_forkserver_preload(list(preload))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)  # some Pythons unblock two of them there
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return workers


def end_with_parent(_worker: int) -> None:
    """In a worker: end when the process that it serves is gone, not its fork server, whose child it is."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


class Guarded(Dataset):
    """Items of `dataset`; what a user can mend comes as a value, since an error travels as a traceback."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __getitem__(self, key: Any) -> Any:
        try:
            return self._dataset[key]
        except (ValueError, OSError) as error:
            return Refusal(str(error), is_value=isinstance(error, ValueError))


class Refusal:
    """An error on its way from a worker."""

    def __init__(self, text: str, *, is_value: bool) -> None:
        self._text, self._is_value = text, is_value

    def error(self) -> ValueError | OSError:
        return ValueError(self._text) if self._is_value else OSError(self._text)
