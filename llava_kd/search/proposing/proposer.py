"""What to try next: TPE of Optuna, over this search's trials and those of similar runs.

TPE reads nothing of a value but its order, so all it is given are places from 0 to 1: no score's scale
counts, and runs on other data, whose scores are of other questions, can stand beside this search's own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from llava_kd.search.proposing.space import Choice, Pruning, Range, Space, same
from llava_kd.search.store.entries import better

STARTUP = 10  # trials, similar runs among them, before TPE takes over from chance
_ATTEMPTS = 50


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Settings that were tried, and where they stand from 0 to 1; None while they run."""

    values: Mapping[str, object]
    place: float | None


def optuna() -> ModuleType:
    """ValueError where it is not installed."""
    try:
        import optuna as package
    except ImportError as error:
        raise ValueError("a search needs the package optuna: pip install 'llava_kd[search]'") from error
    package.logging.set_verbosity(package.logging.WARNING)
    return package


class Proposer:
    """Proposes by number: the same number after the same trials gives the same settings."""

    def __init__(self, space: Space, *, startup: int = STARTUP) -> None:
        self._space = space
        self._optuna = optuna()
        self._startup = startup
        self._distributions = {name: self._distribution(own) for name, own in space.settings.items()}

    def propose(
        self, number: int, seen: Sequence[Seen], similar: Sequence[Seen] = ()
    ) -> dict[str, object] | None:
        """Settings that were not tried in this search; None where the space has no others."""
        if len(seen) >= self._space.size and len(self._distinct(seen)) >= self._space.size:
            return None
        study = self._study(self._seed(number), (*similar, *seen))
        for _ in range(_ATTEMPTS):  # each counts as one that runs, so the next is sought elsewhere
            params = study.ask(self._distributions).params
            values = {name: self._decoded(name, value) for name, value in params.items()}
            if not self._was_tried(values, seen):
                return values
        return self._any_other(number, seen)

    def is_chance(self, seen: Sequence[Seen], similar: Sequence[Seen]) -> bool:
        return sum(one.place is not None for one in (*seen, *similar)) < self._startup

    def _seed(self, number: int) -> int:
        return int.from_bytes(hashlib.sha256(f"{self._space.seed} {number}".encode()).digest()[:4])

    def _study(self, seed: int, seen: Sequence[Seen]) -> Any:
        sampler = self._optuna.samplers.TPESampler(
            n_startup_trials=self._startup, multivariate=True, constant_liar=True, seed=seed
        )
        study = self._optuna.create_study(direction="maximize", sampler=sampler)
        study.add_trials([self._trial(one) for one in seen])
        return study

    def _trial(self, seen: Seen) -> Any:
        state = self._optuna.trial.TrialState
        return self._optuna.trial.create_trial(
            state=state.RUNNING if seen.place is None else state.COMPLETE,
            value=seen.place,
            params={name: self._encoded(name, seen.values[name]) for name in self._distributions},
            distributions=self._distributions,
        )

    def _distribution(self, own: Choice | Range) -> Any:
        of = self._optuna.distributions
        if isinstance(own, Choice):  # by place: Optuna takes no sections of settings as values
            return of.CategoricalDistribution(list(range(len(own.values))))
        if own.is_whole:
            return of.IntDistribution(
                int(own.low), int(own.high), log=own.is_log, step=1 if own.step is None else int(own.step)
            )
        return of.FloatDistribution(own.low, own.high, log=own.is_log, step=own.step)

    def _encoded(self, name: str, value: object) -> object:
        own = self._space.settings[name]
        if isinstance(own, Choice):
            return next(k for k, one in enumerate(own.values) if same(one, value))
        assert isinstance(value, int | float)
        return int(value) if own.is_whole else float(value)

    def _decoded(self, name: str, value: Any) -> object:
        own = self._space.settings[name]
        return own.values[value] if isinstance(own, Choice) else value

    def _was_tried(self, values: Mapping[str, object], seen: Sequence[Seen]) -> bool:
        return any(all(same(one.values[name], value) for name, value in values.items()) for one in seen)

    def _distinct(self, seen: Sequence[Seen]) -> list[Seen]:
        return [one for k, one in enumerate(seen) if not self._was_tried(one.values, seen[:k])]

    def _any_other(self, number: int, seen: Sequence[Seen]) -> dict[str, object] | None:
        """By chance: TPE keeps to what it has found good, which may all have been tried."""
        sampler = self._optuna.samplers.RandomSampler(seed=self._seed(number))
        study = self._optuna.create_study(sampler=sampler)
        for _ in range(_ATTEMPTS * _ATTEMPTS):
            params = study.ask(self._distributions).params
            values = {name: self._decoded(name, value) for name, value in params.items()}
            if not self._was_tried(values, seen):
                return values
        return None


def stands_below(
    pruning: Pruning, score: str, curve: Mapping[int, float], others: Sequence[Mapping[int, float]]
) -> bool:
    """Whether a trial is to be stopped: by Optuna's median rule, its best so far against the others' median.

    Curves are by step; `others` are of the trials that came to their end.
    """
    package = optuna()
    trial, states = package.trial, package.trial.TrialState
    pruner = package.pruners.MedianPruner(
        n_startup_trials=pruning.trials, n_warmup_steps=pruning.after, n_min_trials=1
    )
    study = package.create_study(direction="maximize", pruner=pruner)

    def made(points: Mapping[int, float], state: Any) -> Any:
        values = {step: better(score, value) for step, value in points.items()}
        last = values[max(values)] if state == states.COMPLETE else None
        return trial.create_trial(state=state, value=last, intermediate_values=values)

    for points in others:
        if points:
            study.add_trial(made(points, states.COMPLETE))
    return bool(curve) and pruner.prune(study, made(curve, states.RUNNING))
