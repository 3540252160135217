"""Samples per second on several machines: limits that need no formula, and what a user reads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llava_kd.assembly.planning.estimate import ModelSizes
from llava_kd.assembly.planning.throughput import Network, Rate, step_seconds, throughput
from llava_kd.assembly.settings import load
from llava_kd.cli import main
from llava_kd.config import TrainConfig

FAST = Network(inside=1e9, between=1e9)


@pytest.fixture
def config(stage) -> TrainConfig:
    return load(stage("run", engine="auto", global_batch_size=16, distilled=False))


@pytest.fixture
def student(config: TrainConfig, student_dir: Path) -> ModelSizes:
    return ModelSizes.of_directory(str(student_dir), config)


def rate_of(config: TrainConfig, *, ranks: int = 2, seconds: float = 4.0) -> Rate:
    samples = float(config.global_batch_size)
    return Rate(
        directory=Path("measured"), config=config, ranks=ranks, lines=9, seconds=seconds, samples=samples
    )


def exchange(student: ModelSizes, ranks: int) -> float:
    """Bytes of an all-reduce of fp32 gradients in a ring."""
    return 2 * (ranks - 1) / ranks * 4 * student.trained


def test_the_measured_machine_gives_back_its_rate(config: TrainConfig, student: ModelSizes) -> None:
    slow = Network(inside=exchange(student, 2) / 1e9, between=1e-9)  # a second of the four
    assert step_seconds(config, rate_of(config), slow, 1, student, None) == pytest.approx((4.0, 4.0))


def test_without_any_exchange_the_rate_grows_with_the_machines(
    config: TrainConfig, student: ModelSizes
) -> None:
    for machines in (1, 2, 8):
        found = step_seconds(config, rate_of(config), FAST, machines, student, None)
        assert found == pytest.approx((4.0 / machines,) * 2)


def test_a_larger_batch_takes_longer_in_proportion(config: TrainConfig, student: ModelSizes) -> None:
    larger = replace(config, global_batch_size=48)
    assert step_seconds(larger, rate_of(config), FAST, 2, student, None) == pytest.approx((6.0, 6.0))


def test_exchanges_come_on_top_or_behind_the_computation(config: TrainConfig, student: ModelSizes) -> None:
    """Two ranks exchange for 0.5 s of 4; four on two machines for 0.8 or 8 s, and compute for half."""
    inside = exchange(student, 2) / 1e9 / 0.5
    for seconds, hidden in ((0.8, 2.0), (8.0, 8.0)):
        network = Network(inside=inside, between=exchange(student, 4) / 1e9 / seconds)
        found = step_seconds(config, rate_of(config), network, 2, student, None)
        assert found == pytest.approx((hidden, 3.5 / 2 + seconds))


def test_the_table_has_a_line_for_each_power_of_two_and_says_what_does_not_divide(
    config: TrainConfig, student: ModelSizes
) -> None:
    lines = throughput(config, 12, rate_of(config), FAST, student, None)
    rows = [" ".join(line.split()) for line in lines[2:-1]]
    assert rows == [
        "1 2 4 4 100 %",
        "2 4 2 8 100 %",
        "4 8 1 16 100 %",
        "6 12 do not divide global_batch_size",
    ]


def test_micro_batches_smaller_than_the_measured_are_pointed_out(
    config: TrainConfig, student: ModelSizes
) -> None:
    lines = throughput(config, 16, rate_of(config), FAST, student, None)
    assert [line for line in lines if "smaller micro-batches" in line] == [lines[5]]
    assert lines[5].split()[:2] == ["8", "16"]


def test_settings_that_the_rate_does_not_carry_over_are_named(
    config: TrainConfig, student: ModelSizes
) -> None:
    measured = replace(config, micro_batch_size=4, output_dir="elsewhere", max_steps=1)
    lines = throughput(config, 2, rate_of(measured), FAST, student, None)
    assert lines[1].endswith("which this estimate ignores: micro_batch_size: 4 -> 2")


def test_a_bandwidth_that_the_measured_run_contradicts_is_refused(
    config: TrainConfig, student: ModelSizes
) -> None:
    slow = Network(inside=exchange(student, 2) / 5e9)
    with pytest.raises(ValueError, match=r"communication takes 5 s per step, but .* took 4 s; .*--inside"):
        step_seconds(config, rate_of(config), slow, 1, student, None)
    with pytest.raises(ValueError, match=r"--between must be more than 0 GB/s; got 0"):
        Network(between=0)


def test_a_dry_run_foretells_from_a_run_that_was_made(stage, capsys) -> None:
    path = stage("run", engine="auto", max_steps=4)
    output = path.with_suffix("")
    assert main(["train", str(path)]) == 0
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["ranks"] for line in lines] == [1] * 4
    rate = Rate.of(output)
    assert (rate.ranks, rate.lines, rate.samples) == (1, 3, pytest.approx(4))
    assert rate.seconds == sorted(line["seconds_per_step"] for line in lines[1:])[1]
    words = ["train", str(path), "--dry_run", "--ranks=2", f"--measured={output}", "--between=1"]
    assert main(words) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"samples/s on 1 ranks of one machine: {output}, 3 lines" in said
    assert "busbw 150 GB/s inside a machine (--inside), 1 GB/s between machines (--between)" in said


def test_what_is_no_measured_machine_is_refused(stage, tmp_path: Path, capsys) -> None:
    path = stage("run", engine="auto")
    words = ["train", str(path), "--dry_run", "--ranks=3", "--global_batch_size=6", f"--measured={tmp_path}"]
    assert main(words) == 2
    assert "must be the output_dir of a run, with metrics.jsonl" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text(path.read_text())
    line = {"step": 1, "seconds_per_step": 1.0, "samples_per_s": 4.0, "ranks": 2}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert main(words) == 2
    assert "it has 0 lines there" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text((json.dumps(line) + "\n") * 2)
    assert main(words) == 2
    assert (
        "had 2 ranks on its machine, so the ranks must be a multiple of 2; got 3" in capsys.readouterr().err
    )
