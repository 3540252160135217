"""What the commands share: whole numbers, a command with its function, rates."""

from __future__ import annotations

import argparse
import errno
import os
import select
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llava_kd.assembly.planning.throughput import Network
    from llava_kd.assembly.plugins import Tables

Commands = argparse._SubParsersAction
VERBOSE = "LLAVA_KD_VERBOSE"  # as in assembly/runs/logs.py, which is too long to import here


def count(text: str, *, least: int = 1) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least {least}; got {text}")
    return int(text)


def steps(text: str) -> str:
    """`A-B`, a first and a last step, as a setting writes them."""
    first, dash, last = text.partition("-")
    if not (dash and first.isdecimal() and last.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be a first and a last step, such as 11-13; got {text}")
    return f"[{first},{last}]"


def command(
    group: Commands,
    name: str,
    run: Callable[[argparse.Namespace], int],
    what: str,
    *,
    takes_settings: bool = False,
) -> argparse.ArgumentParser:
    """`takes_settings`: words that it does not know are settings such as --optim.lr=1e-4."""
    parser = group.add_parser(name, help=what, description=what)
    words = parser.prog.partition(" ")[2]  # with those of its group: `recipes list`
    parser.set_defaults(run=run, command=words, takes_settings=takes_settings)
    loud = "also print messages of libraries; without it they go only to the run's logs"
    parser.add_argument("--verbose", action="store_true", help=loud)
    return parser


def spelled(words: Sequence[str]) -> list[str]:
    """Words as people write them: `--dry-run` is --dry_run, and `--optim.lr 1e-4` is --optim.lr=1e-4.

    `--out=~/x` is below the home directory: a shell leaves ~ as it is after a sign.
    """
    found: list[str] = []
    for word in words:
        before = found[-1] if found else ""
        if word.startswith("--"):
            name, is_given, value = word.partition("=")
            value = os.path.expanduser(value) if value.startswith("~/") else value
            found.append("--" + name[2:].replace("-", "_") + is_given + value)
        elif before.startswith("--") and "." in before and "=" not in before:
            found[-1] = f"{before}={word}"
        else:
            found.append(word)
    return found


def joined(rest: Sequence[str]) -> list[str]:
    """Settings that argparse left: of `--seed 3`, which has no dot to be known by, too."""
    found: list[str] = []
    for word in rest:
        if found and not word.startswith("--") and found[-1].startswith("--") and "=" not in found[-1]:
            found[-1] = f"{found[-1]}={word}"
        else:
            found.append(word)
    return found


_A_FILE = "a file stands where a folder must be; name another path"
_NO_ROOM = "free some space there or name a path on another disk, and run the same command again"
_ADVICE = {
    errno.EEXIST: _A_FILE,
    errno.ENOTDIR: _A_FILE,
    errno.EISDIR: "a folder stands where a file must be; remove it or name another path",
    errno.EACCES: "name a path that you may use, or change its permissions",
    errno.EPERM: "name a path that you may use, or change its permissions",
    errno.EROFS: "name a path on a disk that can be written",
    errno.ENOENT: "make it or name another path",
    errno.ENOSPC: _NO_ROOM,
    errno.EDQUOT: _NO_ROOM,
    errno.EFBIG: _NO_ROOM,
}


def refused(error: OSError) -> str:
    """In one line: the file or folder, what the system says of it, and what to do."""
    if error.filename is None or error.strerror is None:
        return " ".join(str(error).split())
    advice = _ADVICE.get(error.errno or 0)
    path = error.filename2 or error.filename  # of a move, where to
    return f"{path}: {error.strerror}" + (f"; {advice}" if advice else "")


def is_first_rank() -> bool:
    """Of a launch of several processes, all of which run the command."""
    return os.environ.get("RANK", "0") == "0"


def show(text: str) -> None:
    """Print what a command was asked for. Whoever reads it may leave when they have seen enough."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _print_nowhere()


def nobody_reads() -> bool:
    """Whether the reader of what is printed has left; what is still to be printed goes nowhere then."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)  # no event is asked for: what remains is that the pipe is broken
    has_left = bool(output.poll(0))
    if has_left:
        _print_nowhere()
    return has_left


def _print_nowhere() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end


def open_streams() -> None:
    """The null device in place of each stream that a shell closed (`2>&-`).

    Python has None there, which libraries do not expect; an error would be printed among the results, and
    the next file that is opened would have the stream's number.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))


def add_plugins(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="FILE",
        help=f"your own Python file or module with {what}; it is executed",
    )


def plugins(arguments: argparse.Namespace) -> Tables:
    """The package's tables with those of the plug-ins that the command names."""
    from llava_kd.assembly.plugins import with_plugins

    return with_plugins(arguments.plugin)


def add_rates(command: argparse.ArgumentParser, when: str = "") -> None:
    """What samples per second on several machines are predicted from."""
    command.add_argument(
        "--measured", metavar="RUN", help=f"{when}output_dir of a run that used all of one machine"
    )
    for name, ranks in (("inside", "on one machine"), ("between", "on several machines")):
        what = f"{when}busbw in GB/s, from all_reduce_perf of nccl-tests, for ranks {ranks}"
        command.add_argument(f"--{name}", type=float, help=what)


def network(arguments: argparse.Namespace) -> Network:
    from llava_kd.assembly.planning.throughput import Network

    given = vars(arguments)
    return Network(**{name: given[name] for name in ("inside", "between") if given[name] is not None})
