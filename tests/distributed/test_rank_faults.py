"""What happens to a run of two ranks when a signal, a death or a full disk comes."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import ranks

pytestmark = pytest.mark.distributed

LONG = {"max_steps": 10_000, "engine": "ddp"}
SOON = 60  # seconds: to start, or to save and end, where ten processes share the cores


def steps(output: Path) -> list[int]:
    path = output / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def start(config: Path, *overrides: str, count: int = 2, **more) -> tuple[ranks.Ranks, Path]:
    output = config.with_suffix("")
    return ranks.Ranks(
        ["train", str(config), *overrides], config.parent / "logs", ranks=count, **more
    ), output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_to_one_rank_stops_all_after_a_checkpoint_and_is_no_failure(stage, number) -> None:
    run, output = start(stage("run", **LONG))
    run.wait_for(lambda: len(steps(output)) >= 2)
    run.signal(number, rank=1)
    ended = run.wait(SOON)
    assert ended.codes == (0, 0), ended.log
    last = steps(output)[-1]
    assert [path.name for path in (output / "checkpoints").iterdir()] == [f"step-{last:08d}"]
    assert f"after step {last}; run the same command again to continue" in ended.logs[0]


def test_the_death_of_a_rank_ends_the_others_with_a_clear_line(stage) -> None:
    run, output = start(stage("run", **LONG))
    run.wait_for(lambda: len(steps(output)) >= 2)
    run.signal(signal.SIGKILL, rank=1)
    ended = run.wait(SOON)
    assert ended.codes == (1, -signal.SIGKILL), ended.log
    assert "another rank is gone" in ended.logs[0]
    assert "Traceback" not in ended.logs[0]


def test_a_loss_that_is_not_finite_stops_every_rank_and_names_its_records(stage) -> None:
    run, output = start(stage("run", lr=1e12, **LONG), "--optim.weight_decay=1e12")
    ended = run.wait(SOON)
    assert ended.codes == (2, 2), ended.log
    assert all("not finite" in log and "this rank's records: " in log for log in ended.logs)
    assert ended.logs[0].split("records: ")[-1] != ended.logs[1].split("records: ")[-1]
    assert not (output / "checkpoints").exists()


def test_a_full_disk_stops_every_rank_and_leaves_the_last_good_checkpoint(stage) -> None:
    """The first checkpoint fits; then nothing larger than a part of one can be written."""
    config = stage("run", engine="ddp", max_steps=4, checkpoint={"every": 2, "keep": 2})
    run, output = start(config, "--max_steps=4")
    assert run.wait(SOON).codes == (0, 0)
    (output / "run.json").unlink()  # as if it had been stopped after step 2
    for name in ("checkpoints/step-00000004", "model"):
        shutil.rmtree(output / name)
    size = (output / "checkpoints/step-00000002/state.safetensors").stat().st_size
    run, _ = start(config, max_file_bytes=size // 2)
    ended = run.wait(SOON)
    assert ended.codes == (2, 2), ended.log
    assert "the checkpoint of step 4 cannot be written" in ended.logs[0]
    assert "Free some space" in ended.logs[0]
    assert "rank 1 stops because another rank did" in ended.logs[1]
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-00000002"]
    run, _ = start(config)
    ended = run.wait(SOON)
    assert ended.codes == (0, 0), ended.log
    assert "resuming from step 2" in ended.logs[0]


def test_the_death_of_a_data_worker_ends_every_rank_and_says_so(stage) -> None:
    run, output = start(stage("run", **LONG), "--data.num_workers=1")
    run.wait_for(lambda: len(steps(output)) >= 2)
    worker = data_workers(run.processes[1].pid)[0]
    os.kill(worker, signal.SIGKILL)
    ended = run.wait(SOON)
    assert all(code > 0 for code in ended.codes), ended.log
    assert "a data worker process died" in ended.logs[1]
    assert "another rank is gone" in ended.logs[0]


def data_workers(pid: int | None) -> list[int]:
    """Grandchildren of a rank: workers are children of its fork server."""
    below = [int(child) for child in children(pid) for child in children(int(child))]
    assert below, "the rank has no worker"
    return below


def children(pid: int | None) -> list[str]:
    """Of all its threads: batches are made on one of their own."""
    listed = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [child for of_thread in listed for child in of_thread]
