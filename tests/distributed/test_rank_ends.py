"""A rank ends with the status of its command, whatever its process group still has to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks

pytestmark = pytest.mark.distributed

# Rank 0 leaves a collective pending and runs a command; rank 1 comes to nothing more. Where the command comes
# back, a thread of gloo is made to wait for the interpreter until Python ends, with `Py_Exit`, which ends it
# in full, as a child of a fork server would not.
BEGIN = """
import builtins, ctypes, fcntl, os, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from llava_kd.cli import command, main
from llava_kd.parallel.world import join

class Slow:
    def __del__(self, sleep=time.sleep):
        sleep(1)

def is_free(lock):
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

world, (alive, came_back) = join("cpu"), map(Path, sys.argv[1:3])
lock = alive.open("a")
if world.rank == 0:
    fcntl.flock(lock, fcntl.LOCK_EX)  # until it has ended
dist.all_reduce(torch.ones(4))
if world.rank == 1:
    deadline = time.monotonic() + 20
    while not came_back.exists() and not is_free(lock) and time.monotonic() < deadline:
        time.sleep(0.02)
    os._exit(0)
dist.all_reduce(torch.ones(1000), async_op=True)
sys.argv = ["llava-kd", *sys.argv[3:]]
"""
END = """
sys.setswitchinterval(1000)
came_back.touch()
end = time.monotonic() + 3
while time.monotonic() < end:
    pass
ctypes.pythonapi.Py_Exit(code)
"""
PENDING = f"{BEGIN}\nbuiltins.slow = Slow()\ncode = main(sys.argv[1:])\n{END}"
# The group is held as a mesh of FSDP2 holds it.
HELD = f"{BEGIN}\nbuiltins.held = dist.group.WORLD, Slow()\ncode = command()\n{END}"
OVER = """
import ctypes, sys
import torch
import torch.distributed as dist
from llava_kd.cli import main
from llava_kd.parallel.world import join
join("cpu")
dist.all_reduce(torch.ones(1000), async_op=True)
code = main(sys.argv[1:])
print("left" if not dist.is_initialized() else "there", flush=True)
ctypes.pythonapi.Py_Exit(code)
"""


def test_a_failed_command_ends_a_rank_at_once_beside_a_collective_that_never_ends(tmp_path: Path) -> None:
    words = [
        PENDING,
        str(tmp_path / "alive"),
        str(tmp_path / "back"),
        "train",
        str(tmp_path / "nowhere.yaml"),
    ]
    ended = ranks.Ranks(words, tmp_path / "logs", ranks=2, function=ranks.execute).wait(60)
    assert ended.codes == (2, 0), ended.log
    assert "nowhere.yaml" in ended.logs[0]


def test_a_finished_command_leaves_the_group(tmp_path: Path) -> None:
    words = [OVER, "config"]
    ended = ranks.Ranks(words, tmp_path / "logs", ranks=2, function=ranks.execute).wait(60)
    assert ended.codes == (0, 0), ended.log
    assert all(log.endswith("left\n") for log in ended.logs)


def test_a_finished_rank_ends_with_its_status_though_its_group_is_held_beside_a_pending_collective(
    tmp_path: Path,
) -> None:
    words = [HELD, str(tmp_path / "alive"), str(tmp_path / "back"), "config"]
    ended = ranks.Ranks(words, tmp_path / "logs", ranks=2, function=ranks.execute).wait(60)
    assert ended.codes == (0, 0), ended.log
    assert "global_batch_size" in ended.logs[0]
