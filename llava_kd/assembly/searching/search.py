"""`llava-kd search`: recipes proposed, trained, scored and entered into the store, within a budget."""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from llava_kd.assembly.runs.children import Children
from llava_kd.assembly.runs.run_dir import locked
from llava_kd.assembly.runs.slots import CLI, Slots, environments
from llava_kd.assembly.runs.stopping import status_of_rest
from llava_kd.assembly.searching.entering import Describer, enter
from llava_kd.assembly.settings import load
from llava_kd.config import TrainConfig
from llava_kd.config.reading import plain
from llava_kd.durable import write_text
from llava_kd.search.findings.curves import stage_log
from llava_kd.search.proposing.proposer import Proposer, Seen, stands_below
from llava_kd.search.proposing.similar import Similar, first_values, similar_runs
from llava_kd.search.proposing.space import Space, read_space, same
from llava_kd.search.proposing.table import results, terminal, trial_line, write_results
from llava_kd.search.proposing.trials import Origin, Trial, Trials, standings_of
from llava_kd.search.running.schedule import Job
from llava_kd.search.running.stream import run_stream
from llava_kd.search.store.database import Store, StoreError
from llava_kd.search.store.entries import DataSet, key_of
from llava_kd.search.store.reading import last_scores

GIVE_UP = 5  # trials from the first on that have failed, and none that has not


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the command line changes of the file. None: as the file has it, one job a GPU or core."""

    output: str | None = None
    store: str | None = None
    num_jobs: int | None = None


def search(path: str | Path, overrides: Sequence[str], choice: Choice) -> int:
    """Try recipes until the budget is spent; go on from what is there. 0, or 128 and the signal of a stop.

    Raises ValueError for a file that does not fit itself, its recipe or what has run, for a store that cannot
    be used, and where no trial has come to a score.
    """
    space = read_space(path, overrides, output=choice.output, store=choice.store)
    proposer = Proposer(space)
    check_settings(space)
    trials = Trials(space)
    store = Store(space.store)
    store.prepare()
    slots = environments([space.tree], choice.num_jobs)
    with locked(space.output, "output"), Children() as children:
        similar = _similar(space, trials, store)
        run = _Search(space, trials, proposer, store, similar)
        is_stopped = run_stream(run, Slots(children, slots), num_slots=len(slots))
        run.end()
        if is_stopped and children.asked:
            number = children.asked[0]
            print(
                f"stopped by {signal.Signals(number).name}; run the same command again to continue",
                flush=True,
            )
            return status_of_rest(number)
        for line in terminal(results(space, trials, similar)):
            print(line)
        print(f"open {space.output / 'results.md'}", flush=True)
    run.refuse_nothing()
    return 0


def check_settings(space: Space) -> None:
    """ValueError, naming the setting, where the recipe or an end of the space is not what `train` takes."""
    settings(space, {})
    for name, own in space.settings.items():
        for value in own.ends:
            try:
                settings(space, {name: value})
            except ValueError as error:
                raise ValueError(f"{space.path}: `space.{name}` cannot be {value!r}: {error}") from error


def settings(space: Space, values: Mapping[str, object]) -> TrainConfig:
    """Those of a trial. ValueError for what `train` would refuse, under the name of the recipe."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / space.recipe.name
        tree = {"output_dir": directory, **space.with_values(values)}
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        try:
            return load(path)
        except ValueError as error:
            raise ValueError(str(error).replace(str(path), str(space.recipe))) from error


def _similar(space: Space, trials: Trials, store: Store) -> list[Similar]:
    """Runs to begin from; this search's own trials, which are in the store too, are not among them."""
    own = {key for trial in trials.all if (key := _key(space, trials, trial)) is not None}
    entries = [entry for entry in store.entries() if entry.key not in own]
    data = Describer().of(settings(space, {})) if entries else None
    if not isinstance(data, DataSet):
        return []
    return similar_runs(space, entries, store.data_sets(), data.features)


def _key(space: Space, trials: Trials, trial: Trial) -> str | None:
    try:
        tree = plain(settings(space, trial.values))
    except ValueError:
        return None
    assert isinstance(tree, dict)
    return key_of(trials.directory(trial), tree)


class _Search:
    """Who thinks of trials and hears of them (`Watcher`)."""

    def __init__(
        self, space: Space, trials: Trials, proposer: Proposer, store: Store, similar: Sequence[Similar]
    ) -> None:
        self._space = space
        self._trials = trials
        self._proposer = proposer
        self._store = store
        self._similar = similar
        self._first = first_values(similar)
        self._describer = Describer()
        self._broken_off = trials.of("running")  # by a stop, or a kill
        self._curves: dict[int, dict[int, float]] = {}
        self._looked: dict[int, float] = {}
        self._before_s = trials.spent_s
        self._since = time.monotonic()
        if similar:
            names = sorted({run.data for run in similar})
            print(f"starts from {len(similar)} runs of the store, on {', '.join(names)}", flush=True)

    # What comes next ----

    def next(self) -> Job | None:
        while True:
            if self._broken_off:
                return self._job(self._broken_off.pop(0))
            if not self._may_begin():
                return None
            proposed = self._propose()
            if proposed is None:
                return None
            trial = self._trials.put(proposed)
            try:
                settings(self._space, trial.values)
            except ValueError as error:
                self._settle(replace(trial, state="failed", failure=f"refused: {error}"))
                continue
            return self._job(trial)

    def _may_begin(self) -> bool:
        space, count = self._space, len(self._trials.all)
        if space.max_trials is not None and count >= space.max_trials:
            return False
        if space.max_minutes is not None and self._spent_s() >= 60 * space.max_minutes:
            return False
        return not self._is_hopeless()

    def _is_hopeless(self) -> bool:
        ended = [trial for trial in self._trials.all if trial.state != "running"]
        return len(ended) >= GIVE_UP and all(trial.state == "failed" for trial in ended)

    def _propose(self) -> Trial | None:
        number, places = len(self._trials.all), standings_of(self._trials.all, self._space.scores)
        seen = [Seen(values=t.values, place=places.get(t.number)) for t in self._trials.all]
        for values in self._first:
            if not any(all(same(one.values[n], v) for n, v in values.items()) for one in seen):
                return Trial(number=number, values=dict(values), origin="similar run")
        others = [run.seen for run in self._similar]
        values = self._proposer.propose(number, seen, others)
        if values is None:
            return None
        origin: Origin = "random" if self._proposer.is_chance(seen, others) else "TPE"
        return Trial(number=number, values=values, origin=origin)

    def _job(self, trial: Trial) -> Job:
        directory, recipe = self._trials.directory(trial), self._trials.recipe(trial)
        tree = self._space.with_values(trial.values)
        log = tree.get("log")
        tree |= {
            "output_dir": str(directory),
            "log": {**(log if isinstance(log, Mapping) else {}), "progress": False},
        }
        recipe.parent.mkdir(parents=True, exist_ok=True)
        write_text(recipe, yaml.safe_dump(tree, sort_keys=False))
        return Job(
            key=trial.name,
            name=f"trial {trial.name}",
            needs=(),
            command=(*CLI, "train", str(recipe)),
            log=self._trials.log(trial),
            is_done=lambda: (directory / "run.json").is_file(),
        )

    # While it runs ----

    def is_hopeless(self, job: Job) -> bool:
        """Looked at anew where its log has grown."""
        pruning, number = self._space.pruning, int(job.key)
        metrics = self._trials.directory(self._trials.all[number]) / "metrics.jsonl"
        if pruning is None or not metrics.is_file() or self._looked.get(number) == metrics.stat().st_size:
            return False
        self._looked[number] = metrics.stat().st_size
        score = self._space.scores[0]
        others = [self._curve(trial) for trial in self._trials.of("complete")]
        return stands_below(pruning, score, self._read_curve(self._trials.all[number]), others)

    def _curve(self, trial: Trial) -> dict[int, float]:
        if trial.number not in self._curves:
            self._curves[trial.number] = self._read_curve(trial)
        return self._curves[trial.number]

    def _read_curve(self, trial: Trial) -> dict[int, float]:
        score = self._space.scores[0]
        lines = stage_log(self._trials.directory(trial))
        return {line.step: line.figures[score] for line in lines if score in line.figures}

    # When it has ended ----

    def ended(self, job: Job, seconds: float, failure: str | None, *, was_asked: bool) -> None:
        trial = self._trials.all[int(job.key)]
        lines = stage_log(self._trials.directory(trial))
        found = last_scores(lines)
        scores = {name: found[name] for name in self._space.scores if name in found}
        has_all = len(scores) == len(self._space.scores)
        if failure is None and not has_all:
            missing = [name for name in self._space.scores if name not in scores]
            failure = f"its log has no {', '.join(missing)}"
        state = "complete" if failure is None else "pruned" if was_asked and has_all else "failed"
        self._settle(
            replace(
                trial,
                state=state,
                scores=scores,
                steps=lines[-1].step if lines else None,
                seconds=lines[-1].seconds if lines else None,
                failure="stopped below the median" if state == "pruned" else failure,
            )
        )

    def _settle(self, trial: Trial) -> None:
        self._trials.put(trial)
        count = sum(one.state != "running" for one in self._trials.all)
        of = "" if self._space.max_trials is None else f" of {self._space.max_trials}"
        print(f"[{count}{of}] {trial_line(trial, self._space.scores)}", flush=True)
        try:
            self._enter()
        except StoreError as error:
            print(f"not added to the store yet: {error}", flush=True)
        self._write()

    def _enter(self) -> None:
        """All that have ended and are not in the store. StoreError where it cannot be written now."""
        waiting = [t for t in self._trials.all if t.state != "running" and not t.is_stored]
        entries, data_sets = [], {}
        for trial in waiting:
            try:
                config = settings(self._space, trial.values)
            except ValueError:  # refused: it has no settings that could be compared
                continue
            directory = self._trials.directory(trial)
            entry, data = enter(self._describer, config, directory, str(directory), trial.failure)
            entries.append(entry)
            if isinstance(data, DataSet):
                data_sets[data.fingerprint] = data
        self._store.add(entries, data_sets.values())
        for trial in waiting:
            self._trials.put(replace(trial, is_stored=True))

    def _write(self) -> None:
        self._trials.write(self._spent_s())
        write_results(results(self._space, self._trials, self._similar), self._space)

    def _spent_s(self) -> float:
        return self._before_s + time.monotonic() - self._since

    # At the end ----

    def end(self) -> None:
        """Write all there is. StoreError where trials could not be entered, after everything is written."""
        self._write()
        try:
            self._enter()
        except StoreError as error:
            left = sum(t.state != "running" and not t.is_stored for t in self._trials.all)
            raise StoreError(
                f"{left} trials are not in the store: {error}; run the same command again to add them"
            ) from error

    def refuse_nothing(self) -> None:
        """ValueError where every trial failed."""
        failed = self._trials.of("failed")
        if failed and len(failed) == len(self._trials.all):
            raise ValueError(
                f"all {len(failed)} trials failed. The first: {failed[0].failure}; fix the recipe or the "
                "space, and name another `output`"
            )
