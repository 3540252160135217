"""A signal to the whole process group of a script at a random moment, again and again; then go on to the end.

As a terminal, a scheduler or the kernel does it: by three signals, to one process and to two ranks, with and
without data workers, and with more micro-batches a step than are prefetched.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from script_runs import Run
from tiny_runs import write_stage

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS = 6
KILLS = 6  # of each chain
CHAINS = 10
ENDS = {signal.SIGKILL: (-9,), signal.SIGINT: (130, -2), signal.SIGTERM: (0, -15)}


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, shapes_dir: Path, student_dir: Path
) -> Callable[[int], tuple[Path, Path, float]]:
    """Settings, undisturbed run and its seconds, by number of ranks."""
    made: dict[int, tuple[Path, Path, float]] = {}

    def get(num_ranks: int) -> tuple[Path, Path, float]:
        if num_ranks not in made:
            output = tmp_path_factory.mktemp("whole") / "run"
            config = write_stage(
                output, data=shapes_dir, student=student_dir, teacher=None, distilled=False, engine="auto",
                global_batch_size=32, micro_batch_size=1, max_steps=STEPS, checkpoint={"every": 2, "keep": 1},
            )  # fmt: skip
            since = time.monotonic()
            run = Run(config, output, num_ranks=num_ranks, num_workers=0)
            said = run.end()
            assert run.process.returncode == 0, said
            made[num_ranks] = config, output, time.monotonic() - since
        return made[num_ranks]

    return get


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(CHAINS))
def test_kills_of_the_group_lose_nothing_and_leave_nobody(whole, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    num_ranks = 1 + seed % 2
    config, undisturbed, seconds = whole(num_ranks)
    output = tmp_path / "run"
    for kill in range(KILLS):
        number = list(ENDS)[kill % len(ENDS)]
        run = Run(config, output, num_ranks=num_ranks, num_workers=chance.randrange(5))
        time.sleep(chance.uniform(0, seconds))
        was_over = run.process.poll() is not None
        if not was_over:
            os.killpg(run.process.pid, number)
        said = run.end()
        print(f"seed {seed}: {number.name}, {num_ranks} ranks: {run.process.returncode}", flush=True)
        assert run.process.returncode in ((0,) if was_over else (0, *ENDS[number])), said
        assert "Traceback" not in said or run.process.returncode == -signal.SIGINT, said
    run = Run(config, output, num_ranks=num_ranks, num_workers=chance.randrange(5))
    said = run.end()
    assert run.process.returncode == 0, said
    expected = load_file(undisturbed / "model" / "model.safetensors")
    got = load_file(output / "model" / "model.safetensors")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    logged = [[json.loads(line) for line in (d / "metrics.jsonl").open()] for d in (undisturbed, output)]
    assert [line["step"] for line in logged[1]] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in logged[1]] == [line["loss"] for line in logged[0]]
