"""`llava-kd`: each command parses its words and calls one function."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from llava_kd import __version__
from llava_kd.assembly.runs.stopping import INTERRUPTED, end_with_torchrun, was_told
from llava_kd.cli import comparisons, datasets, models, scores, settings, stages


def main(words: Sequence[str] | None = None) -> int:
    """Run one command. A mistake that the user can mend is one line on stderr and exit status 2."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(words)
    if rest and not arguments.takes_settings:
        parser.error(f"unknown words: {' '.join(rest)}")
    engines = sorted({word for word in rest if word.startswith("--engine.kind=")})
    if len(engines) > 1:
        parser.error(f"two engines at once, {' and '.join(engines)}; name one")
    arguments.overrides = rest
    end_with_torchrun()
    try:
        return arguments.run(arguments)
    except ValueError as error:
        print(f"llava-kd {arguments.command}: {error}", file=sys.stderr)
        return 2
    except ConnectionError as error:  # another rank is gone: its own message says more than a traceback here
        if was_told():
            return 0  # it had nothing to save, and left before this one
        print(f"llava-kd {arguments.command}: {error}", file=sys.stderr)
        return 1
    except (OSError, ImportError) as error:  # a file, a directory, a disk; a package that is not there
        what = "; install what is missing" if isinstance(error, ImportError) else ""
        print(f"llava-kd {arguments.command}: {' '.join(str(error).split())}{what}", file=sys.stderr)
        return 2
    except (RecursionError, MemoryError) as error:  # of other libraries' readers
        what = (
            "is nested too deeply" if isinstance(error, RecursionError) else "needs more memory than there is"
        )
        print(f"llava-kd {arguments.command}: a file that it reads {what}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"llava-kd {arguments.command}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llava-kd", description="Distil large LLaVA models into small.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for group in (stages, comparisons, settings, scores, models, datasets):
        group.add(commands)
    return parser
