"""Kill -9 at a numbered moment: around every write, rename and removal, and every part of a step."""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
from collections.abc import Callable
from typing import Any

from llava_kd import tensor_files
from llava_kd.assembly.parts import adapters
from llava_kd.distill import student
from llava_kd.training import trainer

_POINTS = (
    (os, "fsync"),
    (os, "unlink"),
    (os, "rmdir"),
    (pathlib.Path, "rename"),
    (pathlib.Path, "replace"),
    (pathlib.Path, "mkdir"),
    (pathlib.Path, "write_text"),
    (shutil, "rmtree"),
    (tensor_files, "save_file"),
    (adapters, "save_stock"),
    (trainer.Trainer, "_resume"),
    (student.Student, "losses"),
    (trainer.Trainer, "step"),
    (trainer.Trainer, "_log"),
    (trainer.Trainer, "_save"),
)
passed = 0


def arm(kill_at: int) -> None:
    """Kill this process as its moment number `kill_at` comes; each call has one before and one after it."""

    def tick() -> None:
        global passed
        passed += 1
        if passed == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    for owner, name in _POINTS:
        setattr(owner, name, _around(getattr(owner, name), tick))


def _around(call: Callable[..., Any], tick: Callable[[], None]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        tick()
        result = call(*args, **kwargs)
        tick()
        return result

    return wrapped


def stop_after(step: int) -> None:
    """Send this process SIGTERM as it begins update number `step`, so that it stops after it."""
    begin = trainer.Trainer.step

    def wrapped(self: trainer.Trainer, batches: Any, number: int) -> trainer.StepResult:
        if number + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return begin(self, batches, number)

    trainer.Trainer.step = wrapped  # type: ignore[method-assign]
