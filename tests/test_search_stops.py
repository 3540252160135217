"""A grid that is stopped or killed goes on and leaves no process behind; a real one to its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from tiny_grids import FakeRuns, edit, write_grid

from llava_kd.assembly import ablate as ablate_module
from llava_kd.assembly.runs.children import Children
from llava_kd.assembly.runs.slots import Slots, environments
from llava_kd.cli import main
from llava_kd.search.running.schedule import Job, Outcome, run_jobs

# The first stage ends at once; the others save when they are asked to stop, and say who they are.
STAGE = """#!/bin/bash
out=$(sed -n 's/^output_dir: //p' "$1")
mkdir -p "$out"
echo '{"step": 10, "seconds_per_step": 1.0}' > "$out/metrics.jsonl"
if [ ! -f FOLDER/first ]; then
  touch FOLDER/first
  echo '{"steps": 10}' > "$out/run.json"
  exit 0
fi
trap 'echo "$$ saved" >> FOLDER/said; exit 0' TERM
trap 'echo "$$ saved" >> FOLDER/said; exit 130' INT
echo $$ >> FOLDER/started
while :; do sleep 0.05; done
"""

STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture
def waiting(tmp_path: Path) -> Iterator[Path]:
    grid = write_grid(tmp_path, {"AA": ["A", "A"], "AB": ["A", "B"]}, seeds=[0])
    (tmp_path / "wait.sh").write_text(STAGE.replace("FOLDER", str(tmp_path)))
    edit(grid, lambda tree: tree.update(command="bash wait.sh"))
    yield grid
    for process in (process for process in STARTED if process.poll() is None):
        process.kill()
    for pid in (tmp_path / "started").read_text().split() if (tmp_path / "started").is_file() else []:
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def started(grid: Path) -> subprocess.Popen[str]:
    """`llava-kd ablate`, once both stages of the second floor run."""
    command = [sys.executable, "-m", "llava_kd.cli", "ablate", str(grid), "--jobs=2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    STARTED.append(process)
    marks = grid.parent / "started"
    deadline = time.monotonic() + 120
    while not marks.is_file() or len(marks.read_text().split()) < 2:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def is_gone(pid: int) -> bool:
    """A child of a killed parent ends with it; give the system a moment."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
        except (ProcessLookupError, FileNotFoundError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def goes_on(grid: Path, monkeypatch) -> list[str]:
    """The same grid to its end, its stages standing in for real ones."""
    fake = FakeRuns().install(monkeypatch)
    assert main(["ablate", str(grid)]) == 0
    return fake.labels()


def test_ctrl_c_lets_the_stages_save_and_the_same_command_goes_on(waiting: Path, monkeypatch) -> None:
    process = started(waiting)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert "stopped by SIGINT; run the same command again to continue" in said
    pids = (waiting.parent / "started").read_text().split()
    assert sorted((waiting.parent / "said").read_text().split("\n")[:-1]) == sorted(
        f"{p} saved" for p in pids
    )
    found = json.loads((waiting.parent / "out" / "results.json").read_text())
    assert found["arms"]["AA"]["missing"] == {"0": "waits"}
    assert sorted(goes_on(waiting, monkeypatch)) == ["A0", "B0"], "the first stage is there"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_a_killed_grid_takes_its_stages_along_and_goes_on(waiting: Path, monkeypatch) -> None:
    process = started(waiting)
    process.kill()
    process.communicate(timeout=60)
    assert all(is_gone(int(pid)) for pid in (waiting.parent / "started").read_text().split())
    assert not (waiting.parent / "said").exists()
    assert sorted(goes_on(waiting, monkeypatch)) == ["A0", "B0"]


def test_a_second_call_into_the_same_output_is_refused(tmp_path: Path, monkeypatch, capsys) -> None:
    grid = write_grid(tmp_path, {"AA": ["A", "A"]}, seeds=[0])
    fake = FakeRuns().install(monkeypatch)
    inner: list[int] = []
    fake.broken = lambda tree: inner.append(main(["ablate", str(grid)])) or False
    assert main(["ablate", str(grid)]) == 0
    assert inner == [2, 2]
    assert "another process is running in" in capsys.readouterr().err


# The order of jobs ----


class Machine:
    """Processes that take as many looks as their name is long; `most` ran at once."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.running: dict[str, int] = {}
        self.started: list[str] = []
        self.done: set[str] = set()
        self.most = 0
        self._stop_after = stop_after

    def job(self, key: str, *needs: str) -> Job:
        return Job(
            key=key, name=key, needs=needs, command=(), log=Path("none"), is_done=lambda: key in self.done
        )

    def start(self, job: Job, slot: int) -> object:
        assert self.done.issuperset(job.needs)
        assert slot not in self.running.values()
        self.running[job.key] = slot
        self.started.append(job.key)
        self.most = max(self.most, len(self.running))
        return [job.key, 3]

    def ended(self, process: object) -> int | None:
        assert isinstance(process, list)
        process[1] -= 1
        if process[1]:
            return None
        del self.running[process[0]]
        if "bad" not in process[0]:
            self.done.add(process[0])
        return 1 if "bad" in process[0] else 0

    def is_stopping(self) -> bool:
        return self._stop_after is not None and len(self.started) >= self._stop_after


def run(machine: Machine, jobs: list[Job], num_slots: int) -> Outcome:
    return run_jobs(
        jobs, machine, num_slots=num_slots, finished=lambda *_: None, failed=lambda *_: None, pause=0.0
    )


@pytest.mark.parametrize("num_slots", [1, 2, 5])
def test_jobs_run_beside_each_other_and_after_what_they_need(num_slots: int) -> None:
    machine = Machine()
    jobs = [
        machine.job("a"),
        machine.job("b", "a"),
        machine.job("c", "b"),
        machine.job("d"),
        machine.job("e", "d"),
    ]
    outcome = run(machine, jobs, num_slots)
    assert outcome.done == {"a", "b", "c", "d", "e"}
    assert machine.most == min(num_slots, 2)


def test_a_failure_is_named_for_all_that_needed_it() -> None:
    machine = Machine()
    jobs = [machine.job("bad"), machine.job("b", "bad"), machine.job("c", "b"), machine.job("d")]
    outcome = run(machine, jobs, 2)
    assert outcome.done == {"d"}
    assert outcome.failed.keys() == {"bad"}
    assert outcome.not_run == {"b": "bad", "c": "bad"}


def test_after_a_stop_nothing_starts_and_nothing_has_failed() -> None:
    machine = Machine(stop_after=2)
    jobs = [machine.job("a"), machine.job("bad"), machine.job("c")]
    outcome = run(machine, jobs, 2)
    assert machine.started == ["a", "bad"]
    assert outcome.is_stopped
    assert outcome.failed == {}


def test_each_gpu_gets_a_job_of_its_own(tmp_path: Path, monkeypatch) -> None:
    grid = write_grid(tmp_path, {"AA": ["A", "A"]}, seeds=[0], common={"engine.device": "cuda"})
    plan = ablate_module.make_plan(ablate_module.read_grid(grid))
    trees = [stage.tree for stage in plan.stages.values()]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    found = [slot["CUDA_VISIBLE_DEVICES"] for slot in environments(trees, None)]
    assert found == ["3", "5"]
    shared = environments(trees, 3)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in shared] == ["3", "5", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert environments(trees, 2)[0]["OMP_NUM_THREADS"] == "1"


# To its end, with real students ----


def in_this_process(monkeypatch) -> None:
    """Starting Python anew for every job would take the time of all of them."""

    def start(slots, job: Job, slot: int) -> int:
        return main(list(job.command[3:]))

    monkeypatch.setattr(Slots, "start", start)
    monkeypatch.setattr(Slots, "ended", lambda slots, status: status)


def test_two_real_arms_to_their_results(stage, shapes_dir: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    stage("plain", distilled=False, max_steps=2)
    stage("taught", max_steps=2)
    slices = {
        "every": 1,
        "slices": {"val": {"data": str(shapes_dir / "validation.json"), "num_questions": 2}},
    }
    tree = {
        "name": "real",
        "output": str(tmp_path / "out"),
        "seeds": [0],
        "baseline": "plain",
        "common": {"evaluate": slices},
        "stages": {"P": {"recipe": "plain.yaml"}, "T": {"recipe": "taught.yaml"}},
        "arms": {"plain": ["P", "P"], "taught": ["P", "T"]},
        "tests": {"test": {"data": str(shapes_dir / "test.json"), "max_new_tokens": 3}},
    }
    grid = tmp_path / "grid.yaml"
    grid.write_text(yaml.safe_dump(tree))
    in_this_process(monkeypatch)
    assert main(["ablate", str(grid)]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["cost"]["finished"] == 3
    assert found["arms"]["taught"]["steps"] == 4
    assert found["tests"]["test"]["questions"] == len(json.loads((shapes_dir / "test.json").read_text()))
    shared, taught = found["arms"]["taught"]["runs"]["0"]
    record = json.loads((tmp_path / "out" / "stages" / taught / "run.json").read_text())
    assert Path(record["parent"]["run"]).name == shared
    assert (
        found["arms"]["taught"]["equal_time"]["gain"] is not None
        or found["arms"]["taught"]["equal_time"]["not_measured"]
    )
    capsys.readouterr()
    recipe = tmp_path / "out" / "recipes" / f"{taught}.yaml"
    assert main(["train", str(recipe)]) == 0, "a stage is a run as any other"
    assert "is complete: nothing to do" in capsys.readouterr().err


def test_children_are_ended_where_this_process_fails(tmp_path: Path) -> None:
    with Children() as children:
        child = children.start(["sleep", "60"], tmp_path / "log", dict(os.environ))
    assert child.poll() == -signal.SIGKILL
