"""A rank ends with the status of its command, whatever its process group still has to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks

pytestmark = pytest.mark.distributed

# `Py_Exit` ends Python in full, which a child of a fork server would not.
PENDING = """
import ctypes, os, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from llava_kd.cli import main
from llava_kd.parallel.world import join
world, there = join("cpu"), Path(sys.argv[1])
dist.all_reduce(torch.ones(4))
if world.rank == 1:
    deadline = time.monotonic() + 20
    while not there.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.5)
    os._exit(0)
dist.all_reduce(torch.ones(1000), async_op=True)
there.touch()
ctypes.pythonapi.Py_Exit(main(sys.argv[2:]))
"""
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

# Where Python's own end is reached, a thread of gloo already waits for the interpreter, which is then let go.
HELD = """
import builtins, ctypes, os, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from llava_kd.cli import command
from llava_kd.parallel.world import join

class Slow:
    def __del__(self, sleep=time.sleep):
        sleep(1)

world, there = join("cpu"), Path(sys.argv[1])
dist.all_reduce(torch.ones(4))
if world.rank == 1:
    deadline = time.monotonic() + 20
    while not there.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.5)
    os._exit(0)
builtins.held = dist.group.WORLD, Slow()  # as a mesh of FSDP2 holds it
dist.all_reduce(torch.ones(1000), async_op=True)
there.touch()
sys.argv = ["llava-kd", *sys.argv[2:]]
code = command()
sys.setswitchinterval(1000)
end = time.monotonic() + 4
while time.monotonic() < end:
    pass
ctypes.pythonapi.Py_Exit(code)
"""


def test_a_failed_command_ends_a_rank_at_once_beside_a_collective_that_never_ends(tmp_path: Path) -> None:
    words = [PENDING, str(tmp_path / "pending"), "train", str(tmp_path / "nowhere.yaml")]
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
    words = [HELD, str(tmp_path / "pending"), "config"]
    ended = ranks.Ranks(words, tmp_path / "logs", ranks=2, function=ranks.execute).wait(60)
    assert ended.codes == (0, 0), ended.log
    assert "global_batch_size" in ended.logs[0]
