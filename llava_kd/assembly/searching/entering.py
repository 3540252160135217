"""Runs into the store, by hand or as the trials of a search."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Sequence
from pathlib import Path

from llava_kd.assembly.searching.describing import data_set_of
from llava_kd.assembly.settings import load
from llava_kd.config import TrainConfig
from llava_kd.config.reading import plain
from llava_kd.evaluation.report.stage_runs import find_runs
from llava_kd.search.store.database import Store
from llava_kd.search.store.entries import DataSet, Entry
from llava_kd.search.store.reading import read_entry


class Describer:
    """Data sets of stages, each read once."""

    def __init__(self) -> None:
        self._known: dict[str, DataSet | str] = {}

    def of(self, config: TrainConfig) -> DataSet | str:
        """Or in a line why its records cannot be read."""
        key = json.dumps(plain(config.data), sort_keys=True, default=str)
        if key not in self._known:
            try:
                self._known[key] = data_set_of(config)
            except (OSError, ValueError) as error:
                self._known[key] = " ".join(str(error).split())
        return self._known[key]


def enter(
    describer: Describer, config: TrainConfig, directory: Path, name: str, failure: str | None = None
) -> tuple[Entry, DataSet | str]:
    """A run as the store keeps it, and its data, or why they cannot be read."""
    tree = plain(config)
    assert isinstance(tree, dict)
    data = describer.of(config)
    fingerprint = data.fingerprint if isinstance(data, DataSet) else None
    return read_entry(directory, tree, name=name, data=fingerprint, failure=failure), data


def add_runs(named: Sequence[str], store: Store) -> list[str]:
    """Enter runs, or all that folders hold, all or none; a line of each.

    ValueError for one that still runs.
    """
    runs = find_runs(named)
    store.prepare()
    describer, entries, data_sets, said = Describer(), [], {}, []
    for run in runs:
        if _is_running(run.directory):
            raise ValueError(
                f"{run.directory} is still running, so nothing was added; wait for it, or leave it out"
            )
        config = load(run.directory / "config.yaml")
        entry, data = enter(describer, config, run.directory, run.name)
        entries.append(entry)
        if isinstance(data, DataSet):
            data_sets[data.fingerprint] = data
        said.append(_line(entry, data))
    store.add(entries, data_sets.values())
    return [*said, f"{len(entries)} runs are now in {store.path}"]


def _line(entry: Entry, data: DataSet | str) -> str:
    scores = ", ".join(f"{name} {value:.4g}" for name, value in entry.scores.items()) or "no score"
    told = scores if entry.failure is None else entry.failure
    unread = (
        ""
        if isinstance(data, DataSet)
        else f"; its data cannot be read, so it cannot support recommendations: {data}"
    )
    return f"{entry.name}: {told}{unread}"


def _is_running(directory: Path) -> bool:
    lock = directory / ".lock"
    if not lock.is_file():
        return False
    with lock.open() as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False
