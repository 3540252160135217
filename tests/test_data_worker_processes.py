"""Data workers: which signals they hear, how they end, and how they say what a user can mend."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.utils.data import DataLoader, Dataset

from llava_kd.data.batches.worker_processes import Guarded, Refusal, end_with_parent, worker_context

# A trainer that notes signals, as in its loop, and still wants its batches.
TRAINER = """
import os, signal, sys, time
from torch.utils.data import DataLoader
from test_data_worker_processes import Numbers
from llava_kd.data.batches.worker_processes import end_with_parent, worker_context

if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
    print("begins", flush=True)
    loader = DataLoader(
        Numbers(), batch_size=None, num_workers=2, multiprocessing_context=worker_context(),
        worker_init_fn=end_with_parent,
    )
    for i, value in enumerate(loader):
        assert value == i
        if i == 0:
            print("runs", flush=True)
        if i == 3 and "wait" in sys.argv:
            time.sleep(600)
    print("all came", flush=True)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # Python unsets functions before it gives its semaphores back
"""


class Numbers(Dataset):
    def __len__(self) -> int:
        return 60

    def __getitem__(self, i: int) -> int:
        return i


class Faulty(Dataset):
    """A mistake in the data, a file that is gone, and a fault of the program."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> int:
        raise (ValueError("record 7 must have an answer"), FileNotFoundError("gone"), KeyError("x"))[i]


def trainer(tmp_path: Path, *words: str) -> subprocess.Popen[str]:
    path = tmp_path / "trainer.py"
    path.write_text(TRAINER)
    more = {"PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[1]}"}
    return subprocess.Popen(
        [sys.executable, str(path), *words],
        env={**os.environ, **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_a_stop_of_the_whole_group_does_not_reach_the_workers(tmp_path: Path) -> None:
    """Also while they, and the server that forks them, start."""
    with trainer(tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begins\n"
        while process.poll() is None:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                os.killpg(process.pid, number)
            time.sleep(0.02)
        said = process.stdout.read()
    assert (said, process.returncode) == ("runs\nall came\n", 0)


@pytest.mark.timeout(120)  # a worker that stays holds the pipe open
def test_a_killed_trainer_leaves_no_worker_and_its_pipe_closes(tmp_path: Path) -> None:
    process = trainer(tmp_path, "wait")
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "begins\n"
        assert process.stdout.readline() == "runs\n"
        assert len(group(process.pid)) >= 4  # itself, fork server, two workers
        process.kill()
        process.stdout.read()  # until all have closed it, which each does before it is gone
        deadline = time.monotonic() + 30
        while left := [pid for pid in group(process.pid) if pid != process.pid]:
            assert time.monotonic() < deadline, left
            time.sleep(0.02)
    finally:
        for pid in group(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.communicate()


def group(pgid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended since it was listed
        if int(fields[2]) == pgid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def test_what_a_user_can_mend_comes_without_a_traceback_and_a_fault_with_one() -> None:
    loader = DataLoader(
        Guarded(Faulty()),
        batch_size=None,
        sampler=range(3),
        num_workers=1,
        multiprocessing_context=worker_context(),
        worker_init_fn=end_with_parent,
    )
    came = iter(loader)
    for kind, text in ((ValueError, "record 7 must have an answer"), (OSError, "gone")):
        refusal = next(came)
        assert isinstance(refusal, Refusal)
        assert type(refusal.error()) is kind
        assert str(refusal.error()) == text
    with pytest.raises(KeyError, match="Original Traceback"):
        next(came)
