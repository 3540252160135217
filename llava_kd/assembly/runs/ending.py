"""How a rank of several ends, beside threads of its process group that Python does not know of.

A thread of gloo holds the tensors of a collective, and with them objects of Python, a moment longer than it
takes, or until a peer comes. What it gives back while Python ends aborts the process: "terminate called
without an active exception" (https://github.com/pytorch/pytorch/pull/179291).
"""

from __future__ import annotations

import atexit
import os
import sys

import torch.distributed as dist


def is_rank_of_several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def left(status: int) -> int:
    """`status` of a command that went to its end: its group is left first, which waits for those threads."""
    if is_rank_of_several():
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
