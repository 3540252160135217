"""Operations in the log and traces of steps: there when asked for, and the run the same."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_kd.assembly.settings import load
from llava_kd.assembly.train import train
from llava_kd.cli.main import main
from llava_kd.training.measuring.operations import Counted


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").open()]


def test_a_run_tells_the_operations_of_both_models(stage, tmp_path: Path) -> None:
    train(load(stage("run")))
    for line in lines(tmp_path / "run"):
        assert line["student_tflop"] > line["teacher_tflop"] > 0, "it has a backward, and a narrower model"
        seconds = line["seconds_per_step"]
        assert line["student_tflop_per_s"] == pytest.approx(line["student_tflop"] / seconds, rel=0.05)
        assert "student_mfu" not in line, "nobody knows the peak of this processor"


def test_a_cached_teacher_costs_its_head_alone(stage, tmp_path: Path) -> None:
    from llava_kd.assembly.cache_teacher import cache_teacher

    live = load(stage("live"))
    train(live)
    cache_teacher(live, tmp_path / "cache", mode="hidden")
    train(load(stage("stored"), [f"--teacher.cache={tmp_path / 'cache'}"]))
    of_live, of_stored = lines(tmp_path / "live")[0], lines(tmp_path / "stored")[0]
    assert of_stored["student_tflop"] == of_live["student_tflop"]
    assert 0 < of_stored["teacher_tflop"] < 0.5 * of_live["teacher_tflop"]


class Two:
    """A loader of two steps, each of one micro-batch, which is a number."""

    def batches(self, first_step: int, last_step: int):
        for step in range(first_step, last_step):
            yield [step + 1]

    def telemetry(self) -> dict[str, float]:
        return {"data_wait_s": 0.5}


def test_operations_are_those_since_the_last_look_and_a_peak_makes_a_share() -> None:
    counted = Counted(Two(), {"student": lambda batch: 1e12 * batch}, peak=4e12)  # pyright: ignore
    batches = counted.batches(0, 2)
    next(batches)
    first = counted.telemetry()
    next(batches)
    assert (first["student_tflop"], counted.telemetry()["student_tflop"]) == (1.0, 2.0)
    assert first["peak_tflops"] == 4.0
    assert first["data_wait_s"] == 0.5


def test_traced_steps_leave_a_trace_and_the_same_model(stage, tmp_path: Path) -> None:
    train(load(stage("plain")))
    assert main(["train", str(stage("traced")), "--profile", "2-3"]) == 0
    with gzip.open(tmp_path / "traced" / "profile" / "trace-rank0.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    assert any(event.get("name") == "aten::mm" for event in events)
    table = (tmp_path / "traced" / "profile" / "operators-rank0.txt").read_text()
    assert "aten::mm" in table
    plain, traced = (
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("plain", "traced")
    )
    assert all(torch.equal(plain[name], tensor) for name, tensor in traced.items())


def test_steps_that_are_done_are_said_not_to_be_traced(
    stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(load(stage("run", max_steps=2)))
    train(load(stage("run", max_steps=3), ["--profile.steps=[1,2]"]))
    assert "steps 1 to 2 are done already" in capsys.readouterr().err
    assert not (tmp_path / "run" / "profile").exists()


def test_a_run_that_stops_inside_keeps_its_trace(stage, tmp_path: Path) -> None:
    train(load(stage("run"), ["--profile.steps=[3,90]"]))
    assert (tmp_path / "run" / "profile" / "trace-rank0.json.gz").is_file()


@pytest.mark.parametrize("words", [["--profile", "3"], ["--profile", "5-3"], ["--profile=0-2"]])
def test_steps_that_are_none_are_refused(stage, words: list[str], capsys) -> None:
    try:
        status = main(["train", str(stage("run")), *words])
    except SystemExit as end:  # argparse's
        status = end.code
    assert status == 2
    assert "profile" in capsys.readouterr().err
