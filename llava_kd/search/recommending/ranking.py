"""Recipes for data that are new: by the places of runs on data that look alike, with recipes that are near.

A recipe is what differs among the runs of the store, but for paths and the seed. The place that is expected
of one is a mean over runs, each weighed by how alike its data are and how near its recipe is (a Nadaraya-
Watson mean), with one more run of place 0.5, so that a single one proves little.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from llava_kd.search.findings.statistics import spearman
from llava_kd.search.proposing.space import same
from llava_kd.search.store.entries import DataSet, Entry
from llava_kd.search.store.features import similarity
from llava_kd.search.store.standing import standings

LEAST_RUNS, LEAST_DATA_SETS = 20, 2
LEAST_SIMILAR = 0.1
_LOCAL = (
    *("seed", "data.path", "data.images", "data.sources", "data.records", "teacher.cache", "plugins"),
    *("student.checkpoint", "teacher.checkpoint"),
)
_REACH = 0.15  # of a setting's range, were all to differ by as much
_DOUBT = 1.0  # runs of place 0.5 that are added
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """A run: how much it counts, and why. `near` is of its recipe, `alike` of its data."""

    run: str
    data: str
    alike: float
    near: float
    place: float
    scores: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A recipe, by the settings that differ; `weight`: how many runs on the same data it is worth."""

    settings: Mapping[str, object]
    place: float
    weight: float
    seconds: float | None
    evidence: tuple[Evidence, ...]


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """From the best to the worst. `check`: rank correlation where each data set was left out, by its name."""

    advice: tuple[Advice, ...]
    num_runs: int
    num_failed: int
    alike: Mapping[str, float]
    check: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class _Run:
    entry: Entry
    recipe: Mapping[str, object]
    place: float
    data: DataSet


def recommend(
    entries: Sequence[Entry], data_sets: Mapping[str, DataSet], features: Mapping[str, float]
) -> Recommendation:
    """ValueError where the store holds too little, or nothing that looks like the data."""
    runs = _usable(entries, data_sets)
    _refuse_too_small(runs, entries)
    alike = {run.data.fingerprint: similarity(features, run.data.features) for run in runs}
    names = {run.data.fingerprint: run.data.name for run in runs}
    nearest = max(alike, key=lambda key: alike[key])
    if alike[nearest] < LEAST_SIMILAR:
        raise ValueError(
            f"no dataset in the store is similar to this one: the nearest is {names[nearest]}, with "
            f"similarity {alike[nearest]:.2f}, and at least {LEAST_SIMILAR} is needed; start with the "
            "unchanged recipe"
        )
    near = _nearness(runs)
    recipes = {_text(run.recipe): run.recipe for run in runs}
    advice = [_advice(recipe, runs, alike, near) for recipe in recipes.values()]
    advice.sort(key=lambda one: (-one.place, -one.weight, _text(one.settings)))
    return Recommendation(
        advice=tuple(advice),
        num_runs=len(runs),
        num_failed=sum(entry.failure is not None for entry in entries),
        alike={names[key]: value for key, value in sorted(alike.items(), key=lambda item: -item[1])},
        check=_left_out(runs, near),
    )


def _usable(entries: Sequence[Entry], data_sets: Mapping[str, DataSet]) -> list[_Run]:
    places = standings(entries)
    known = [entry for entry in entries if entry.key in places and entry.data in data_sets]
    keys = sorted({key for entry in known for key in entry.settings} - set(_LOCAL))
    differing = [
        key
        for key in keys
        if any(not same(entry.settings.get(key), known[0].settings.get(key)) for entry in known)
    ]
    return [
        _Run(
            entry=entry,
            recipe={key: entry.settings.get(key) for key in differing},
            place=places[entry.key],
            data=data_sets[str(entry.data)],
        )
        for entry in known
    ]


def _refuse_too_small(runs: Sequence[_Run], entries: Sequence[Entry]) -> None:
    num_data = len({run.data.fingerprint for run in runs})
    if len(runs) < LEAST_RUNS or num_data < LEAST_DATA_SETS:
        raise ValueError(
            f"the store is too small to recommend from: {len(runs)} runs with scores that can be compared, "
            f"on {num_data} datasets ({len(entries)} runs in all); at least {LEAST_RUNS} on "
            f"{LEAST_DATA_SETS} are needed; start with the unchanged recipe, or `llava-kd search`"
        )
    if not runs[0].recipe:
        raise ValueError(
            "all runs in the store have the same settings, so no recipe can be recommended; add runs with "
            "other settings"
        )


def _nearness(
    runs: Sequence[_Run],
) -> Callable[[Mapping[str, object], Mapping[str, object]], float]:
    """From 1, the same recipe, towards 0: by the share of its range that each number differs, 1 for words."""
    scales = {key: _scale([run.recipe[key] for run in runs]) for key in runs[0].recipe}

    def near(first: Mapping[str, object], second: Mapping[str, object]) -> float:
        square = math.fsum(scale(first[key], second[key]) ** 2 for key, scale in scales.items())
        return math.exp(-square / (len(scales) * _REACH**2))

    return near


def _scale(values: Sequence[object]) -> Callable[[object, object], float]:
    numbers = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) < len(values):
        return lambda first, second: float(not same(first, second))
    low, high = min(numbers), max(numbers)
    if low > 0 and high / low >= 10:  # as rates are: what counts is by which factor they differ
        return lambda a, b: abs(math.log(float(str(a)) / float(str(b)))) / math.log(high / low)
    return lambda a, b: abs(float(str(a)) - float(str(b))) / (high - low)


def _advice(
    recipe: Mapping[str, object],
    runs: Sequence[_Run],
    alike: Mapping[str, float],
    near: Callable[[Mapping[str, object], Mapping[str, object]], float],
) -> Advice:
    nearness = [near(recipe, run.recipe) for run in runs]
    weights = [alike[run.data.fingerprint] * value for run, value in zip(runs, nearness, strict=True)]
    own = [run.entry.seconds for run in runs if run.recipe == recipe and run.entry.seconds is not None]
    order = sorted(range(len(runs)), key=lambda k: -weights[k])[:_SHOWN]
    return Advice(
        settings=recipe,
        place=_expected(weights, runs),
        weight=math.fsum(weights),
        seconds=statistics.fmean(own) if own else None,
        evidence=tuple(
            Evidence(
                run=runs[k].entry.name,
                data=runs[k].data.name,
                alike=alike[runs[k].data.fingerprint],
                near=nearness[k],
                place=runs[k].place,
                scores=runs[k].entry.scores,
            )
            for k in order
        ),
    )


def _expected(weights: Sequence[float], runs: Sequence[_Run]) -> float:
    total = math.fsum(w * run.place for w, run in zip(weights, runs, strict=True))
    return (total + 0.5 * _DOUBT) / (math.fsum(weights) + _DOUBT)


def _left_out(
    runs: Sequence[_Run], near: Callable[[Mapping[str, object], Mapping[str, object]], float]
) -> dict[str, float]:
    """How well the order on each data set is predicted from the others; not of one with under three runs."""
    found: dict[str, float] = {}
    for key in dict.fromkeys(run.data.fingerprint for run in runs):
        own = [run for run in runs if run.data.fingerprint == key]
        others = [run for run in runs if run.data.fingerprint != key]
        alike = [similarity(own[0].data.features, run.data.features) for run in others]
        foretold = [
            _expected(
                [a * near(mine.recipe, run.recipe) for a, run in zip(alike, others, strict=True)], others
            )
            for mine in own
        ]
        value = spearman(foretold, [run.place for run in own])
        if value is not None:
            found[own[0].data.name] = value
    return found


def _text(recipe: Mapping[str, object]) -> str:
    return json.dumps(dict(recipe), sort_keys=True, default=str)
