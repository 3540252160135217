"""What is said while a run goes on: to people on stderr, and by every rank into a file of its own.

`OUT/logs/rank00003.log` holds what rank 3 and its libraries said, the rank and the time on every line. What
libraries say goes there alone, and to stderr too where VERBOSE is set in the environment.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers
from tqdm import tqdm

from llava_kd.parallel.world import World

VERBOSE = "LLAVA_KD_VERBOSE"  # `--verbose` sets it, so that the ranks of a launcher have it too
FOLDER = "logs"
DEEPSPEED = "DeepSpeed"  # its logger, which others import too; it writes to stdout
_OWN = logging.getLogger("llava_kd")


def is_verbose() -> bool:
    return os.environ.get(VERBOSE, "") not in ("", "0")


def log_file(output: Path, rank: int) -> Path:
    return output / FOLDER / f"rank{rank:05d}.log"


def speaker(world: World) -> Callable[[str], None]:
    """Says a message once, on the first rank, above its line of progress; each rank's file keeps it."""

    def say(message: str) -> None:
        _OWN.info(message)
        if world.is_main:
            tqdm.write(message, file=sys.stderr)  # above a line of progress, not into it
            sys.stderr.flush()

    return say


class _EveryLine(logging.Formatter):
    """Time and rank before each line of a message, not only before its first."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        head = f"{self.formatTime(record, '%Y-%m-%d %H:%M:%S')} rank {self._rank} {record.levelname.lower()}"
        where = "" if record.name == _OWN.name else f" {record.name}"
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + "".join(traceback.format_exception(*record.exc_info)).rstrip()
        return "\n".join(f"{head}{where}: {line}" for line in text.splitlines() or [""])


class _Terminal(logging.Handler):
    """Warnings of this package; with `verbose` whatever the libraries say too."""

    def __init__(self, *, verbose: bool) -> None:
        super().__init__()
        self._verbose = verbose

    def emit(self, record: logging.LogRecord) -> None:
        is_own = record.name.split(".")[0] == _OWN.name
        if (is_own and record.levelno >= logging.WARNING) or (self._verbose and not is_own):
            tqdm.write(record.getMessage(), file=sys.stderr)


class _Redirected(logging.Filter):
    """Of a library's logger that writes to a stream by itself: to these handlers instead."""

    def __init__(self, handlers: list[logging.Handler]) -> None:
        super().__init__()
        self._handlers = handlers

    def filter(self, record: logging.LogRecord) -> bool:
        for handler in self._handlers:
            handler.handle(record)
        return False


@contextmanager
def logged(output: Path, world: World) -> Iterator[None]:
    """Keep what is said during the block, and the error that ends it. ValueError where it cannot."""
    root, handlers = logging.getLogger(), _handlers(output, world)
    level = root.level
    root.setLevel(logging.INFO)
    _OWN.setLevel(logging.INFO)
    for handler in handlers:
        root.addHandler(handler)
    redirected = _Redirected(handlers)
    logging.getLogger(DEEPSPEED).addFilter(redirected)
    logging.captureWarnings(True)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()
    transformers.logging.disable_default_handler()
    transformers.logging.enable_propagation()
    try:
        yield
    except BaseException as error:
        handlers[0].handle(_last_words(error))  # into the file alone: the command says it to people
        raise
    finally:
        transformers.logging.disable_propagation()
        transformers.logging.enable_default_handler()
        transformers.logging.set_verbosity(verbosity)
        logging.captureWarnings(False)
        logging.getLogger(DEEPSPEED).removeFilter(redirected)
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
        root.setLevel(level)


def _last_words(error: BaseException) -> logging.LogRecord:
    """With where it happened, unless it is one that a user can mend, or a stop."""
    level, said = logging.ERROR, "the run ends"
    if isinstance(error, ValueError | OSError):
        said = str(error)
    elif isinstance(error, SystemExit):
        level, said = logging.INFO, "stopped outside of any step"
    shows = said == "the run ends"
    found = (type(error), error, error.__traceback__) if shows else None
    return _OWN.makeRecord(_OWN.name, level, __file__, 0, said, (), found)


def _handlers(output: Path, world: World) -> list[logging.Handler]:
    path = log_file(output, world.rank)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"the log {path} cannot be written ({error}); free space or change the permissions"
        ) from error
    file.setFormatter(_EveryLine(world.rank))
    return [file, _Terminal(verbose=is_verbose())] if world.is_main or is_verbose() else [file]
