"""What an arm knew after how many steps, seconds and operations, from the logs of its stages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_kd.evaluation.report.results import read_metrics

DIAGNOSED = ("gradient/", "gradient_share/", "tokens/")


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measurement: the figure after so much of the whole chain.

    `seconds` of training; `tflop`: 10^12 operations of both models on all ranks, None where a log has none.
    """

    steps: int
    seconds: float
    tflop: float | None
    value: float


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Points in order, and where the chain ends."""

    points: tuple[Point, ...]
    steps: int
    seconds: float
    tflop: float | None


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a stage's log: seconds since its start, questions and checkpoints left out; `tflop` too."""

    step: int
    seconds: float
    tflop: float | None
    figures: dict[str, float]


def stage_log(directory: Path) -> list[Line]:
    """Empty where nothing has been logged."""
    path = directory / "metrics.jsonl"
    lines: list[Line] = []
    if not path.is_file():
        return lines
    step, seconds = 0, 0.0
    tflop: float | None = 0.0
    for row in read_metrics(path):
        # After a kill the rate of the first line stands for the steps before it too, whose time was lost.
        seconds += (int(row["step"]) - step) * row.get("seconds_per_step", 0.0)
        step = int(row["step"])
        tflop = _plus(tflop, _operations(row))
        lines.append(Line(step=step, seconds=seconds, tflop=tflop, figures=row))
    return lines


def _operations(row: Mapping[str, float]) -> float | None:
    """Of both models since the line before, on all ranks; None in a log from before they were counted."""
    if "student_tflop" not in row:
        return None
    return (row["student_tflop"] + row.get("teacher_tflop", 0.0)) * row.get("ranks", 1)


def _plus(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other


def chain_curve(directories: Sequence[Path], figure: str | None) -> Curve:
    """The stages one after the other, a shared one counted in full."""
    points, steps, seconds = [], 0, 0.0
    tflop: float | None = 0.0
    for directory in directories:
        lines = stage_log(directory)
        points += [
            Point(
                steps=steps + line.step,
                seconds=seconds + line.seconds,
                tflop=_plus(tflop, line.tflop),
                value=line.figures[figure],
            )
            for line in lines
            if figure is not None and figure in line.figures
        ]
        if lines:
            steps, seconds = steps + lines[-1].step, seconds + lines[-1].seconds
            tflop = _plus(tflop, lines[-1].tflop)
    return Curve(points=tuple(points), steps=steps, seconds=seconds, tflop=tflop)


def last_diagnosis(directory: Path) -> dict[str, float]:
    """What the last diagnosis of a stage found (docs/diagnostics.md); empty where there was none."""
    of_lines = (
        {n: v for n, v in line.figures.items() if n.startswith(DIAGNOSED)} for line in stage_log(directory)
    )
    return next((found for found in reversed(list(of_lines)) if found), {})


def value_at(curve: Curve, what: str, most: float) -> float | None:
    """The last measurement up to `most` of `what`, a field of a point; never one between two; None before."""
    reached = [
        point for point in curve.points if (spent := getattr(point, what)) is not None and spent <= most
    ]
    return reached[-1].value if reached else None


def finished_steps(directory: Path) -> int | None:
    """Of a complete stage, as its run.json has it."""
    record = run_record(directory)
    return None if record is None else int(record["steps"])


def run_record(directory: Path) -> dict | None:
    path = directory / "run.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        int(record["steps"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}); remove it, then run the same command again to finish that stage"
        ) from error
    return record
