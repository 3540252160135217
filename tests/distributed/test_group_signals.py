"""Ctrl-C, a scheduler's stop and `kill -9` of a script: to all of its process group, while it trains."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from script_runs import PATIENCE, Run

pytestmark = pytest.mark.distributed

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 0, signal.SIGUSR1: 0, signal.SIGKILL: -9}
# Ranks, workers of each, signal: more micro-batches a step than are prefetched, in all of them.
CASES = [
    (1, 1, signal.SIGINT),
    (2, 2, signal.SIGINT),
    (2, 1, signal.SIGKILL),
]
MORE = [
    (1, 2, signal.SIGKILL),
    (1, 0, signal.SIGTERM),
    (1, 2, signal.SIGTERM),
    (1, 3, signal.SIGINT),
    (1, 4, signal.SIGUSR1),
    (2, 0, signal.SIGTERM),
    (2, 4, signal.SIGUSR1),
]


# Where the flag is, the next file that a rank makes safe takes longer than torchrun waits for its ranks.
SLOW_SAVE = """
import os, time

def fsync(number, really=os.fsync):
    if "RANK" in os.environ and os.path.exists(os.environ["SLOW_SAVE"]):
        os.unlink(os.environ["SLOW_SAVE"])
        time.sleep(45)
    really(number)

os.fsync = fsync
"""


def wait_for_a_step(run: Run, output: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not (output / "metrics.jsonl").is_file() and run.process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_checkpoint_of_two_ranks_may_take_longer_than_their_launcher_waits(
    stage, tmp_path: Path, number: signal.Signals
) -> None:
    """45 s, where torchrun kills its ranks 30 s after it has heard a signal itself."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SLOW_SAVE)
    flag = tmp_path / "slow"
    environment = {"PYTHONPATH": str(tmp_path / "site"), "SLOW_SAVE": str(flag)}
    config = stage("run", distilled=False, engine="auto", global_batch_size=4, max_steps=10_000)
    output = config.with_suffix("")
    run = Run(config, output, num_ranks=2, num_workers=0, environment=environment)
    wait_for_a_step(run, output)
    flag.touch()
    began = time.monotonic()
    os.killpg(run.process.pid, number)
    said = run.end()
    assert not flag.exists()
    assert time.monotonic() - began > 45
    assert run.process.returncode == STATUS[number], said
    last = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert [path.name for path in (output / "checkpoints").iterdir()] == [f"step-{last:08d}"], said


@pytest.mark.parametrize(
    ("num_ranks", "num_workers", "number"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)],
)
def test_a_signal_to_the_group_costs_nothing_and_leaves_nobody(
    stage, num_ranks: int, num_workers: int, number: signal.Signals
) -> None:
    config = stage(
        "run", distilled=False, engine="auto", global_batch_size=32, micro_batch_size=1, max_steps=10_000
    )
    output = config.with_suffix("")
    run = Run(config, output, num_ranks=num_ranks, num_workers=num_workers)
    wait_for_a_step(run, output)
    os.killpg(run.process.pid, number)
    said = run.end()
    assert run.process.returncode == STATUS[number], said
    if number != signal.SIGKILL:  # what is killed while it hands a tensor over may say so
        assert "Traceback" not in said
    if number != signal.SIGKILL:
        last = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])["step"]
        assert f"stopped by {number.name} after step {last}; run the same command again" in said
        assert [path.name for path in (output / "checkpoints").iterdir()] == [f"step-{last:08d}"]


# Rank 1 is told to stop as it reads its stage file, while the other waits for it to join.
STOP_EARLY = """
import os, signal, sys

def stop(event, words):
    if event == "open" and str(words[0]) == os.environ["STAGE"]:
        os.kill(os.getpid(), int(os.environ["SIGNAL"]))

if os.environ.get("RANK") == "1":
    sys.addaudithook(stop)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_to_one_rank_before_the_first_step_ends_all_of_them(
    stage, tmp_path: Path, number: signal.Signals
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(STOP_EARLY)
    config = stage("run", distilled=False, engine="auto", global_batch_size=4, max_steps=1)
    environment = {"PYTHONPATH": str(tmp_path / "site"), "STAGE": str(config), "SIGNAL": str(int(number))}
    run = Run(config, config.with_suffix(""), num_ranks=2, num_workers=0, environment=environment)
    said = run.end()
    assert run.process.returncode == 128 + number, said
    assert f"stopped by {number.name} outside of any step; run the same command again to continue" in said
    assert "Traceback" not in said
