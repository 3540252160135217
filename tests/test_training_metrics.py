"""The metrics file: means over its interval, rates, and no step twice after a resume."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llava_kd.training.metrics import Metrics
from llava_kd.training.trackers import TensorBoardTracker, WandbRun, WandbTracker


class Memory:
    """Tracker that keeps what it is given."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, Mapping[str, float]]] = []
        self.is_closed = False

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self.logged.append((step, dict(figures)))

    def close(self) -> None:
        self.is_closed = True


def lines(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def run(metrics: Metrics, first: int, last: int) -> None:
    """Log steps `first` to `last`; the loss of a step is its number."""
    for step in range(first, last + 1):
        figures = {"loss": torch.tensor(float(step))}
        metrics.add(step, figures, {"samples": torch.tensor(4.0)}, lambda: {"data_wait_s": 0.0, "lr": 0.5})
    metrics.close()


def test_a_line_holds_the_means_since_the_one_before(tmp_path: Path) -> None:
    run(Metrics(tmp_path, num_steps=7, every=3), 1, 7)
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(3, 2.0), (6, 5.0), (7, 7.0)]


def test_amounts_become_rates(tmp_path: Path) -> None:
    run(Metrics(tmp_path, num_steps=4, every=2), 1, 4)
    for line in lines(tmp_path):
        assert line["samples_per_s"] == pytest.approx(4.0 / line["seconds_per_step"])
        assert line["lr"] == 0.5


def test_what_the_loader_counts_becomes_a_rate_and_a_fill(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, num_steps=2, every=1)
    counts = [
        {"data_wait_s": 0.0, "images": 6.0, "tokens": 30.0, "token_places": 40.0},
        {"data_wait_s": 0.0, "images": 0.0, "tokens": 0.0, "token_places": 0.0},
    ]
    for step, telemetry in enumerate(counts, start=1):
        metrics.add(step, {"loss": torch.tensor(1.0)}, {}, lambda t=telemetry: t)
    metrics.close()
    first, second = lines(tmp_path)
    assert first["fill"] == 0.75
    assert first["images_per_s"] == pytest.approx(6.0 / first["seconds_per_step"])
    assert second["images_per_s"] == 0
    assert "fill" not in second


def test_trackers_get_what_the_file_gets(tmp_path: Path) -> None:
    memory = Memory()
    run(Metrics(tmp_path, num_steps=4, every=2, trackers=[memory]), 1, 4)
    assert [step for step, _ in memory.logged] == [2, 4]
    for line, (_, figures) in zip(lines(tmp_path), memory.logged, strict=True):
        assert line == {"step": line["step"], **figures}
    assert memory.is_closed


def test_a_resumed_run_drops_the_lines_it_will_write_again(tmp_path: Path) -> None:
    run(Metrics(tmp_path, num_steps=8, every=2), 1, 6)
    again = Metrics(tmp_path, num_steps=8, every=2)
    again.resume(4)
    run(again, 5, 8)
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6, 8]


def test_a_line_that_a_crash_cut_off_is_dropped(tmp_path: Path) -> None:
    run(Metrics(tmp_path, num_steps=8, every=2), 1, 4)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 6, "lo')
    again = Metrics(tmp_path, num_steps=8, every=2)
    again.resume(4)
    run(again, 5, 8)
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6, 8]


def test_a_fresh_start_drops_every_line(tmp_path: Path) -> None:
    run(Metrics(tmp_path, num_steps=4, every=2), 1, 4)
    again = Metrics(tmp_path, num_steps=4, every=2)
    again.resume(0)
    run(again, 1, 4)
    assert [line["step"] for line in lines(tmp_path)] == [2, 4]


def test_a_resume_that_cannot_write_keeps_every_line(tmp_path: Path) -> None:
    """As a kill at that moment does: cutting the file first loses what is not yet written back."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, 2001)))
    before = path.read_text()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            Metrics(tmp_path, num_steps=3000).resume(1990)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == before
    Metrics(tmp_path, num_steps=3000).resume(1990)
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 1991))


def test_a_run_that_goes_on_asks_wandb_for_the_same_id(tmp_path: Path, monkeypatch) -> None:
    """What is handed to the package, which is not installed everywhere."""
    asked: list[dict[str, object]] = []

    def init(**given: object) -> None:
        asked.append(given)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=RuntimeError))
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    for project in ("a", "a", "b"):
        WandbTracker(tmp_path / "run", WandbRun(project=project, name="n"), config={})
    first, second, other = (given["id"] for given in asked)
    assert first == second != other
    assert all(given["resume"] == "allow" for given in asked)
    named = WandbRun(project="a", name="n", entity="e", group="g", tags=("x", "y"), id="own")
    WandbTracker(tmp_path / "run", named, config={})
    assert {key: asked[-1][key] for key in ("name", "entity", "group", "tags", "id")} == {
        "name": "n",
        "entity": "e",
        "group": "g",
        "tags": ["x", "y"],
        "id": "own",
    }
    assert asked[0]["tags"] is None  # an empty list would leave WANDB_TAGS out
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    WandbTracker(tmp_path / "run", WandbRun(project="a", name="n"), config={})
    assert asked[-1]["id"] == "mine"


def test_tensorboard_leaves_out_what_is_logged_again(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for steps in ((2, 4, 6), (4, 6)):
        tracker = TensorBoardTracker(tmp_path)
        for step in steps:
            tracker.log(step, {"loss": float(step)})
        tracker.close()
    read = events.EventAccumulator(str(tmp_path))
    read.Reload()
    assert [event.step for event in read.Scalars("loss")] == [2, 4, 6]
