"""How a rank of several ends, beside threads of its process group that Python does not know of.

A thread of gloo holds the tensors of a collective, and with them objects of Python, a moment longer than it
takes, or until a peer comes. Where it waits for the interpreter to give them back while Python ends, the
process aborts: "terminate called without an active exception" (https://github.com/pytorch/pytorch/pull/179291).
"""

from __future__ import annotations

import atexit
import os
import sys
from types import ModuleType
from typing import NoReturn


def is_rank_of_several() -> bool:
    return _group() is not None


def _group() -> ModuleType | None:
    """torch.distributed where this process is in a group; a command that never imported it is in none."""
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized():
        return None
    return dist if dist.get_world_size() > 1 else None


def left(status: int) -> int:
    """`status` of a command that went to its end: its group is left first, which waits for those threads."""
    if (dist := _group()) is not None:
        dist.destroy_process_group()
    return status


def broken_off(status: int) -> int:
    """`status` of one that did not: a rank ends here, for others may never come to what is pending."""
    if is_rank_of_several():
        _end(status)
    return status


def at_the_end_of_the_process(status: int) -> int:
    """`status`, of all that this process was for: one that a launcher started among several ends here.

    Leaving the group waits for its threads only where nobody else holds it, as the mesh of FSDP2 does.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        _end(status)
    return status


def _end(status: int) -> NoReturn:
    """All that Python does at its end which others could miss."""
    sys.stdout.flush()
    sys.stderr.flush()
    atexit._run_exitfuncs()  # a tracker's, which closes its run
    os._exit(status)
