"""How good a run is among its like: by its place, so that no figure's scale counts more than another's."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from llava_kd.search.findings.statistics import ranks
from llava_kd.search.store.entries import Entry, better


def places(values: Sequence[float]) -> list[float]:
    """Of each value among all, more being better: from near 0 for the lowest to near 1; equal ones share."""
    return [(rank - 0.5) / len(values) for rank in ranks(values)]


def mean_places(scores: Sequence[Mapping[str, float]], names: Iterable[str]) -> list[float]:
    """For every one of `scores` the mean of its places over the figures `names`, which all of them have."""
    by_name = [places([better(name, one[name]) for one in scores]) for name in names]
    return [statistics.fmean(each) for each in zip(*by_name, strict=True)]


def standings(entries: Sequence[Entry]) -> dict[str, float]:
    """By the key of a run: the mean of its places over its figures, each among the runs on the same data.

    Left out: what failed, what has no data that could be read, and figures that one run alone has.
    """
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        if entry.failure is None and entry.data is not None:
            for name in entry.scores:
                groups.setdefault((entry.data, name), []).append(entry)
    found: dict[str, list[float]] = {}
    for (_, name), group in groups.items():
        if len(group) < 2:
            continue
        values = [better(name, entry.scores[name]) for entry in group]
        for entry, place in zip(group, places(values), strict=True):
            found.setdefault(entry.key, []).append(place)
    return {key: statistics.fmean(own) for key, own in found.items()}
