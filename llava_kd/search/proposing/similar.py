"""Runs of the store that a search may begin from: on data that look alike, within the same space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llava_kd.search.proposing.proposer import Seen
from llava_kd.search.proposing.space import Space, same
from llava_kd.search.store.entries import DataSet, Entry
from llava_kd.search.store.features import similarity
from llava_kd.search.store.standing import standings

MOST_RUNS = 60  # that TPE is shown, the most similar data first: more would outweigh what this search finds
MOST_FIRST = 3  # that are tried before anything else
LEAST_SIMILAR = 0.1


@dataclass(frozen=True, kw_only=True)
class Similar:
    """A run of the store: its values in the space, its place among the runs on its own data."""

    name: str
    data: str
    alike: float
    values: Mapping[str, object]
    place: float

    @property
    def seen(self) -> Seen:
        return Seen(values=self.values, place=self.place)


def similar_runs(
    space: Space,
    entries: Sequence[Entry],
    data_sets: Mapping[str, DataSet],
    features: Mapping[str, float],
) -> list[Similar]:
    """Those on the most similar data first, and of one data set the best first."""
    places = standings(entries)
    found = []
    for entry in entries:
        data = data_sets.get(entry.data or "")
        if data is None or entry.key not in places or not space.holds(entry.settings):
            continue
        alike = similarity(features, data.features)
        if alike >= LEAST_SIMILAR:
            values = {name: entry.settings[name] for name in space.settings}
            found.append(
                Similar(name=entry.name, data=data.name, alike=alike, values=values, place=places[entry.key])
            )
    found.sort(key=lambda run: (-run.alike, run.data, -run.place, run.name))
    return found[:MOST_RUNS] if len(found) <= MOST_RUNS else _shared_out(found)


def _shared_out(found: Sequence[Similar]) -> list[Similar]:
    """As many of each data set, spread from its best to its worst: TPE learns from both."""
    by_data: dict[str, list[Similar]] = {}
    for run in found:
        by_data.setdefault(run.data, []).append(run)
    each = max(1, MOST_RUNS // len(by_data))
    kept = []
    for runs in by_data.values():
        count = min(each, len(runs))
        kept += [runs[k * (len(runs) - 1) // max(1, count - 1)] for k in range(count)]
    return kept[:MOST_RUNS]


def first_values(runs: Sequence[Similar]) -> list[Mapping[str, object]]:
    """The best settings of each of the most similar data sets, each once."""
    chosen: list[Mapping[str, object]] = []
    done: set[str] = set()
    for run in sorted(runs, key=lambda run: (-run.alike, run.data, -run.place)):
        if run.data in done:
            continue
        done.add(run.data)
        if not any(all(same(one[n], v) for n, v in run.values.items()) for one in chosen):
            chosen.append(run.values)
    return chosen[:MOST_FIRST]
