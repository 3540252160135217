"""How a rank of several ends, beside threads of its process group that Python does not know of.

A thread of gloo holds the tensors of a collective, and with them objects of Python, a moment longer than it
takes, or until a peer comes. What it gives back while Python ends aborts the process: "terminate called
without an active exception" (https://github.com/pytorch/pytorch/pull/179291).
"""

from __future__ import annotations

import atexit
import os
import sys
from types import ModuleType


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
        sys.stdout.flush()
        sys.stderr.flush()
        atexit._run_exitfuncs()  # a tracker's, which closes its run
        os._exit(status)
    return status
