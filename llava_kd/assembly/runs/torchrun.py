"""`python -m llava_kd.assembly.runs.torchrun WORDS`: torchrun that says in one line that a rank failed.

torchrun itself ends with a traceback of its own and a table, above which the rank's message is lost.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def run(words: Sequence[str]) -> int:
    """0, or the exit status of the rank that failed first, as a shell reports it."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it reports the same rank
    try:
        main(list(words))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"rank {rank} {_end(failure.exitcode)}", file=sys.stderr, flush=True)
        return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
    return 0


def _end(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}: see its message above"
    name = signal.Signals(-status).name
    return f"was ended by {name}" + (": often the machine has no memory left" if name == "SIGKILL" else "")


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
