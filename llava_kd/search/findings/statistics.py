"""Means over few seeds, paired differences with intervals, and the agreement of two orders."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypedDict

from llava_kd.evaluation.report.results import t_interval


class Estimate(TypedDict):
    """A mean over seeds. For one seed its standard error, and the ends of the interval, are None."""

    mean: float
    error: float | None
    low: float | None
    high: float | None
    count: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, standard error and two-sided 95 % interval by Student's t. ValueError without a value."""
    if not values:
        raise ValueError("a mean needs at least one value; got none")
    count, mean = len(values), math.fsum(values) / len(values)
    if count == 1:
        return {"mean": mean, "error": None, "low": None, "high": None, "count": 1}
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    low, high = t_interval(values)
    return {"mean": mean, "error": spread / math.sqrt(count), "low": low, "high": high, "count": count}


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate | None:
    """The difference over the seeds that both have; None where there is none."""
    gaps = [values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())]
    return estimate(gaps) if gaps else None


def as_text(value: Estimate | None, *, digits: int = 1, sign: str = "", none: str = "-") -> str:
    """`mean +- half the interval`, the mean alone where there is no interval; `sign` "+" shows both signs."""
    if value is None:
        return none
    mean = f"{value['mean']:{sign}.{digits}f}"
    if value["low"] is None or value["high"] is None:
        return mean
    return f"{mean} +- {(value['high'] - value['low']) / 2:.{digits}f}"


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Correlation of ranks, equal values sharing theirs; None under three pairs or where one side is flat."""
    if len(first) != len(second):
        raise ValueError(f"ranks are compared in pairs; got {len(first)} and {len(second)} values")
    if len(first) < 3:
        return None
    return _pearson(ranks(first), ranks(second))


def ranks(values: Sequence[float]) -> list[float]:
    """From 1 for the lowest; equal values get the mean of the places that they take up."""
    order = sorted(values)
    return [order.index(value) + (order.count(value) + 1) / 2 for value in values]


def _pearson(first: Sequence[float], second: Sequence[float]) -> float | None:
    x, y = (math.fsum(side) / len(side) for side in (first, second))
    products = math.fsum((a - x) * (b - y) for a, b in zip(first, second, strict=True))
    spread = math.fsum((a - x) ** 2 for a in first) * math.fsum((b - y) ** 2 for b in second)
    return products / math.sqrt(spread) if spread else None
