"""Means, intervals and ranks of a grid, against hand-made figures and numpy."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from llava_kd.search.findings.curves import (
    Curve,
    Point,
    chain_curve,
    last_diagnosis,
    stage_log,
    value_at,
)
from llava_kd.search.findings.statistics import as_text, estimate, paired, ranks, spearman


def test_a_mean_with_its_error_and_interval_by_hand() -> None:
    """2, 4, 9: mean 5, variance 13, error sqrt(13/3), and t of two degrees of freedom is 4.303."""
    found = estimate([2.0, 4.0, 9.0])
    assert found["mean"] == 5.0
    assert found["error"] == pytest.approx(math.sqrt(13 / 3))
    assert found["low"] == pytest.approx(5 - 4.303 * math.sqrt(13 / 3))
    assert found["high"] == pytest.approx(5 + 4.303 * math.sqrt(13 / 3))


@pytest.mark.parametrize("count", [2, 5, 12])
def test_the_error_is_that_of_numpy(count: int) -> None:
    values = np.random.default_rng(count).normal(size=count)
    found = estimate(values.tolist())
    assert found["mean"] == pytest.approx(values.mean())
    assert found["error"] == pytest.approx(values.std(ddof=1) / math.sqrt(count))


def test_one_seed_has_no_interval() -> None:
    assert estimate([0.4]) == {"mean": 0.4, "error": None, "low": None, "high": None, "count": 1}
    with pytest.raises(ValueError, match="at least one value"):
        estimate([])


def test_the_interval_holds_the_mean_as_often_as_it_says() -> None:
    """Five seeds at a time from a known mean: some 95 of 100 intervals hold it (a normal one would 88)."""
    draws_NS = np.random.default_rng(0).normal(3.0, 2.0, size=(2000, 5))
    held = [e["low"] < 3.0 < e["high"] for e in map(estimate, draws_NS.tolist())]
    assert 0.94 < np.mean(held) < 0.96


def test_differences_are_paired_by_seed() -> None:
    """Seeds differ by 10, arms by 1: unpaired, the difference would drown. Seed 7 has no partner."""
    found = paired({0: 11.0, 1: 21.5, 2: 30.5, 7: 99.0}, {2: 30.0, 1: 20.0, 0: 10.0})
    assert found is not None
    assert found["mean"] == pytest.approx(1.0)
    assert found["error"] == pytest.approx(0.5 / math.sqrt(3))
    assert found["count"] == 3
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_ranks_share_their_places() -> None:
    assert ranks([10.0, 30.0, 20.0, 30.0]) == [1.0, 3.5, 2.0, 3.5]


def test_spearman_by_hand() -> None:
    """1 - 6 sum d^2 / (n (n^2 - 1)): one swap of neighbours among 7 gives 1 - 12 / 336."""
    order = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert spearman(order, [2.0, 1.0, 3.0, 4.0, 5.0, 6.0, 7.0]) == pytest.approx(1 - 12 / 336)
    assert spearman(order, [math.exp(v) for v in order]) == pytest.approx(1.0)
    assert spearman(order, order[::-1]) == pytest.approx(-1.0)


@pytest.mark.parametrize("seed", range(3))
def test_spearman_is_the_correlation_of_ranks(seed: int) -> None:
    drawn = np.random.default_rng(seed)
    first, second = drawn.integers(0, 6, size=9).tolist(), drawn.integers(0, 6, size=9).tolist()

    def places(values: list[int]) -> list[float]:
        return [sum(o < v for o in values) + (sum(o == v for o in values) + 1) / 2 for v in values]

    assert spearman(first, second) == pytest.approx(np.corrcoef(places(first), places(second))[0, 1])


def test_no_rank_correlation_of_two_arms_or_of_equal_ones() -> None:
    assert spearman([1.0, 2.0], [1.0, 2.0]) is None
    assert spearman([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
    with pytest.raises(ValueError, match="3 and 2 values"):
        spearman([1.0, 2.0, 3.0], [1.0, 2.0])


# Curves ----


def write_log(directory: Path, lines: list[dict]) -> Path:
    directory.mkdir()
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def test_seconds_add_up_over_lines_and_stages(tmp_path: Path) -> None:
    first = write_log(
        tmp_path / "first", [{"step": 10, "seconds_per_step": 0.5}, {"step": 15, "seconds_per_step": 1.0}]
    )
    second = write_log(
        tmp_path / "second",
        [{"step": 4, "seconds_per_step": 2.0, "slice/val": 0.25}, {"step": 8, "seconds_per_step": 2.0}],
    )
    assert [(line.step, line.seconds) for line in stage_log(first)] == [(10, 5.0), (15, 10.0)]
    curve = chain_curve([first, second], "slice/val")
    assert (curve.steps, curve.seconds) == (23, 26.0)
    assert curve.points == (Point(steps=19, seconds=18.0, tflop=None, value=0.25),)
    assert chain_curve([tmp_path / "none"], "slice/val") == Curve(points=(), steps=0, seconds=0.0, tflop=0.0)


def test_operations_add_up_over_ranks_models_lines_and_stages(tmp_path: Path) -> None:
    counted = {"seconds_per_step": 1.0, "ranks": 4, "student_tflop": 3.0}
    first = write_log(tmp_path / "first", [{"step": 1, **counted}, {"step": 2, **counted, "ranks": 2}])
    second = write_log(tmp_path / "second", [{"step": 1, **counted, "teacher_tflop": 2.0, "slice/val": 0.5}])
    curve = chain_curve([first, second], "slice/val")
    assert curve.points[0].tflop == curve.tflop == 4 * 3 + 2 * 3 + 4 * (3 + 2)


def test_the_last_diagnosis_is_the_last_line_that_has_one(tmp_path: Path) -> None:
    found = {"gradient/relation": 0.5, "gradient_share/relation": 0.25, "tokens/top1_agreement": 0.75}
    older = {name: 2 * value for name, value in found.items()}
    lines = [{"step": 1, **older}, {"step": 50, "loss": 1.0, **found}, {"step": 60, "loss": 1.0}]
    assert last_diagnosis(write_log(tmp_path / "run", lines)) == found
    assert last_diagnosis(write_log(tmp_path / "old", [{"step": 10, "loss": 1.0}])) == {}
    assert last_diagnosis(tmp_path / "none") == {}


def test_a_curve_is_read_at_what_was_asked_by_then() -> None:
    points = tuple(Point(steps=s, seconds=2.0 * s, tflop=None, value=s / 100) for s in (10, 20, 30))
    curve = Curve(points=points, steps=30, seconds=60.0, tflop=None)
    assert value_at(curve, "seconds", 39.9) == 0.1
    assert value_at(curve, "seconds", 40.0) == 0.2
    assert value_at(curve, "seconds", 1000.0) == 0.3
    assert value_at(curve, "steps", 9) is None
    assert value_at(curve, "steps", 29) == 0.2


def test_an_estimate_as_text_is_the_mean_and_half_its_interval() -> None:
    found = estimate([1.0, 2.0, 3.0])
    assert found["low"] is not None
    assert found["high"] is not None
    half = (found["high"] - found["low"]) / 2
    assert as_text(found, digits=2, sign="+") == f"+2.00 +- {half:.2f}"
    assert as_text(estimate([2.0])) == "2.0"
    assert as_text(None) == "-"
    assert as_text(None, none="") == ""
