"""What a search has tried, on disk after every change: the same command goes on from there."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from llava_kd.durable import write_text
from llava_kd.search.grids.manifest import read_record
from llava_kd.search.grids.sharing import deciding
from llava_kd.search.proposing.space import Space
from llava_kd.search.store.standing import mean_places

VERSION = 1
TRIALS = "trials.json"
State = Literal["running", "complete", "pruned", "failed"]
Origin = Literal["similar run", "TPE", "random"]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """`scores` are those that the search seeks; of one that was pruned, the last. `failure`: why it ended."""

    number: int
    values: Mapping[str, object]
    origin: Origin
    state: State = "running"
    scores: Mapping[str, float] = field(default_factory=dict)
    steps: int | None = None
    seconds: float | None = None
    failure: str | None = None
    is_stored: bool = False

    @property
    def name(self) -> str:
        return f"{self.number:03d}"


class Trials:
    """Those of one search. `spent_s`: seconds that all calls took before this one."""

    def __init__(self, space: Space) -> None:
        self._space = space
        self.path = space.output / TRIALS
        record = read_record(self.path, VERSION, _check)
        if record is not None:
            _refuse_other(space, record, self.path)
        self.spent_s = float(record["spent_s"]) if record else 0.0
        self.all = [Trial(**one) for one in record["trials"]] if record else []

    def directory(self, trial: Trial) -> Path:
        return self._space.output / "trials" / trial.name

    def recipe(self, trial: Trial) -> Path:
        return self._space.output / "recipes" / f"{trial.name}.yaml"

    def log(self, trial: Trial) -> Path:
        return self._space.output / "logs" / f"{trial.name}.log"

    def put(self, trial: Trial) -> Trial:
        """A new one at the end, or another state of one that is there; on disk when this returns."""
        if trial.number == len(self.all):
            self.all.append(trial)
        else:
            self.all[trial.number] = trial
        self.write(self.spent_s)
        return trial

    def write(self, spent_s: float) -> None:
        self.spent_s = spent_s
        record = {
            "version": VERSION,
            **_identity(self._space),
            "spent_s": spent_s,
            "trials": [dataclasses.asdict(trial) for trial in self.all],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, json.dumps(record, indent=1, default=str) + "\n")

    def of(self, state: State) -> list[Trial]:
        return [trial for trial in self.all if trial.state == state]


def standings_of(trials: Sequence[Trial], scores: Sequence[str]) -> dict[int, float]:
    """By number, of those that ended: by the mean of their places over `scores`, from 0, the worst, to 1.

    Those that were pruned stand below all that came to their end, and what failed below those.
    """
    layers = [
        [t for t in trials if t.state == "complete"],
        [t for t in trials if t.state == "pruned"],
        [t for t in trials if t.state == "failed"],
    ]
    count, below = sum(map(len, layers)), 0
    found: dict[int, float] = {}
    for layer in reversed(layers):
        if layer and layer[0].state == "failed":
            means = [0.5] * len(layer)
        else:
            means = mean_places([trial.scores for trial in layer], scores) if layer else []
        for trial, mean in zip(layer, means, strict=True):
            found[trial.number] = (below + mean * len(layer)) / count
        below += len(layer)
    return found


def best_of(trials: Sequence[Trial], scores: Sequence[str]) -> Trial | None:
    """The one that stands highest of those that came to their end; the earliest of equal ones."""
    places = standings_of(trials, scores)
    done = [trial for trial in trials if trial.state == "complete"]
    return max(done, key=lambda trial: (places[trial.number], -trial.number)) if done else None


def _identity(space: Space) -> dict:
    """What may not change while a search goes on; its budget, its pruning and its store may."""
    left_out = {*space.settings}
    recipe = {key: value for key, value in deciding(space.tree).items() if key not in left_out}
    return {
        "name": space.name,
        "scores": list(space.scores),
        "seed": space.seed,
        "space": {name: dataclasses.asdict(own) for name, own in space.settings.items()},
        "recipe": recipe,
    }


def _refuse_other(space: Space, record: Mapping, path: Path) -> None:
    """ValueError naming the first things that are not what they were when the search began."""
    now = json.loads(json.dumps(_identity(space), default=str))
    changes = [
        f"{key} {record[key]} -> {now[key]}"
        for key in ("name", "scores", "seed")
        if record.get(key) != now[key]
    ]
    for section in ("space", "recipe"):
        old, new = record.get(section, {}), now[section]
        for key in sorted({**old, **new}):
            if key not in old or key not in new or old[key] != new[key]:
                told = [_told(tree.get(key, "not there")) for tree in (old, new)]
                changes.append(f"{section}: {key} {told[0]} -> {told[1]}")
    if changes:
        more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
        raise ValueError(
            f"{path.parent} contains another search: {'; '.join(changes[:3])}{more}; restore these "
            "settings, or name another `output`"
        )


def _told(value: object) -> str:
    if isinstance(value, Mapping) and "values" in value:
        return f"one of {value['values']}"
    if isinstance(value, Mapping) and "low" in value:
        return f"{value['low']:g} to {value['high']:g}{', log' if value['is_log'] else ''}"
    return str(value)


def _check(record: dict) -> None:
    states = {one["state"] for one in record["trials"]}
    if not states <= set(get_args(State)):
        raise ValueError(f"unknown states {sorted(states)}")
