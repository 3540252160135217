"""`llava-kd`: each command parses its words and calls one function."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence

from llava_kd import __version__
from llava_kd.assembly.runs.ending import at_the_end_of_the_process, broken_off, is_rank_of_several, left
from llava_kd.assembly.runs.stopping import INTERRUPTED, end_with_torchrun, status_of_rest, was_told
from llava_kd.cli import canary, comparisons, datasets, models, projects, scores, settings, stages
from llava_kd.cli.words import VERBOSE, joined, nobody_reads, open_streams, refused, spelled


def command() -> int:
    """`main` as all that a process does: what the installed script and `python -m llava_kd.cli` call."""
    open_streams()
    return at_the_end_of_the_process(main())


def main(words: Sequence[str] | None = None) -> int:
    """Run one command. A mistake that the user can mend is one line on stderr and exit status 2."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(spelled(sys.argv[1:] if words is None else words))
    rest = joined(rest)
    if rest and not arguments.takes_settings:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    engines = sorted({word for word in rest if word.startswith("--engine.kind=")})
    if len(engines) > 1:
        parser.error(f"only one engine can be used; got {' and '.join(engines)}: name one")
    arguments.overrides = rest
    if arguments.verbose:
        os.environ[VERBOSE] = "1"  # for what it starts, too
    elif os.environ.get(VERBOSE, "") in ("", "0"):
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # of what it says as it is imported
    end_with_torchrun()
    try:
        status = arguments.run(arguments)
    except (Exception, KeyboardInterrupt) as error:
        return broken_off(_status_after(error, arguments.command))
    return left(status)


def _status_after(error: Exception | KeyboardInterrupt, command: str) -> int:
    """What is said of it, and the exit status; an error of the program itself goes on up."""
    status, said = 2, str(error)
    if isinstance(error, BrokenPipeError) and nobody_reads():  # as a shell reports what SIGPIPE ended
        return status_of_rest(signal.SIGPIPE)
    if isinstance(error, ConnectionError):  # another rank is gone: its message says more than a traceback
        if was_told():
            return 0  # it had nothing to save, and left before this one
        status = 1
    elif isinstance(error, OSError):  # a file, a directory, a disk
        said = refused(error)
    elif isinstance(error, ImportError):  # a package that is not there
        said = f"{' '.join(said.split())}; install what is missing"
    elif isinstance(error, RecursionError):  # of other libraries' readers, as the next
        said = "an input file is nested too deeply; make it flatter"
    elif isinstance(error, MemoryError):
        said = "there is not enough memory to read an input file"
    elif isinstance(error, KeyboardInterrupt):
        status, said = INTERRUPTED, "interrupted"
    elif not isinstance(error, ValueError):
        if not is_rank_of_several():
            raise error
        traceback.print_exception(error, file=sys.stderr)
        return 1
    print(f"llava-kd {command}: {said}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava-kd", description="Distil large LLaVA models into small ones."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for group in (projects, stages, comparisons, settings, scores, models, datasets, canary):
        group.add(commands)
    return parser
