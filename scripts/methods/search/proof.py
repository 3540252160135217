"""Trials until a search finds what 40 random ones would have: by chance, cold TPE, TPE from three siblings.

    python scripts/methods/search/proof.py [--seeds 10] [--out DIR]

Replayed over table.json beside this file, which scripts/methods/search/table.py filled by 576 real trainings:
nothing is trained here, a trial looks its score up. Each of the four data sets is the target in turn, the
other three its siblings, each with a history of 40 random trials in a store. Per seed and target: the best
score of 40 random recipes (drawn without repeats) is the mark, and each way to search counts its trials until
it reaches the mark; one that does not within 60 counts 60. Searches use llava_kd's own store, similarity and
proposals. A cell without a score (the training fell apart) is a failed trial. Means are over the four targets
in each seed, then over seeds. The valid-run rate is the share of trials with a score in the first 20.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from llava_kd.search.findings.statistics import as_text, estimate, paired
from llava_kd.search.proposing.proposer import Proposer, Seen
from llava_kd.search.proposing.similar import Similar, first_values, similar_runs
from llava_kd.search.proposing.space import Choice, Range, Space
from llava_kd.search.proposing.trials import Trial, standings_of
from llava_kd.search.store.database import Store
from llava_kd.search.store.entries import DataSet, Entry
from llava_kd.search.store.features import Seen as Record
from llava_kd.search.store.features import describe

SCORE, MARK_TRIALS, MOST, EARLY = "slice/test", 40, 60, 20
Recipe = Mapping[str, object]
Propose = Callable[[int, Sequence[Trial]], Recipe]


class Table:
    """Scores of one data set by recipe."""

    def __init__(self, record: Mapping, name: str) -> None:
        self.name, self.names = name, list(record["space"])
        self.pictures = record["data"][name]["pictures"]
        rows = record["data"][name]["rows"]
        self._scores = {self._key(row): row["score"] for row in rows}
        self.recipes = [{key: row[key] for key in self.names} for row in rows]

    def _key(self, recipe: Recipe) -> tuple:
        return tuple(recipe[name] for name in self.names)

    def score(self, recipe: Recipe) -> float | None:
        return self._scores[self._key(recipe)]

    def data_set(self) -> DataSet:
        """What a store would know: questions of ten classes on pictures of 12 x 12."""
        records = [
            Record(talk=[("What pattern is it?", str(k % 10))], num_pictures=1) for k in range(self.pictures)
        ]
        return DataSet(fingerprint=self.name, name=self.name, features=describe(records, [(12, 12)]))


def space_of(record: Mapping, seed: int) -> Space:
    settings: dict[str, Choice | Range] = {
        "rate": Range(low=0, high=len(record["space"]["rate"]) - 1),
        **{name: Choice(values=tuple(values)) for name, values in record["space"].items() if name != "rate"},
    }
    return Space(
        name="replay", path=Path(), what="", recipe=Path(), tree={}, settings=settings, scores=(SCORE,),
        max_trials=MOST, max_minutes=None, pruning=None, store=Path(), seed=seed, output=Path(),
    )  # fmt: skip


def siblings(tables: Sequence[Table], target: Table, space: Space, seed: int) -> list[Similar]:
    """From a store of 40 random trials on each of the other data sets."""
    with tempfile.TemporaryDirectory() as directory:
        store = Store(Path(directory) / "store.sqlite")
        for table in tables:
            if table is target:
                continue
            chosen = random.Random(f"{seed} {table.name} history").sample(table.recipes, MARK_TRIALS)
            entries = [_entry(table, recipe, k) for k, recipe in enumerate(chosen)]
            store.add(entries, [table.data_set()])
        return similar_runs(space, store.entries(), store.data_sets(), target.data_set().features)


def _entry(table: Table, recipe: Recipe, k: int) -> Entry:
    score = table.score(recipe)
    return Entry(
        key=f"{table.name} {k}",
        name=f"{table.name} {k}",
        settings=recipe,
        data=table.name,
        scores={} if score is None else {SCORE: score},
        failure=None if score is not None else "the training fell apart",
    )


def by_chance(table: Table, seed: int) -> Propose:
    order = random.Random(f"{seed} {table.name} chance").sample(table.recipes, len(table.recipes))
    return lambda number, _: order[number]


def by_tpe(space: Space, runs: Sequence[Similar]) -> Propose:
    """As `llava-kd search`: first the siblings' best, then TPE."""
    proposer, first, similar = Proposer(space), first_values(runs), [run.seen for run in runs]

    def propose(number: int, trials: Sequence[Trial]) -> Recipe:
        if number < len(first):
            return first[number]
        places = standings_of(trials, space.scores)
        seen = [Seen(values=t.values, place=places[t.number]) for t in trials]
        values = proposer.propose(number, seen, similar)
        assert values is not None
        return values

    return propose


def search(table: Table, propose: Propose, mark: float) -> tuple[int, float]:
    """Trials until the mark, and the share with a score of the first twenty."""
    trials: list[Trial] = []
    reached: int | None = None
    while len(trials) < MOST and (reached is None or len(trials) < EARLY):
        recipe = propose(len(trials), trials)
        score = table.score(recipe)
        trials.append(
            Trial(
                number=len(trials),
                values=recipe,
                origin="TPE",
                state="failed" if score is None else "complete",
                scores={} if score is None else {SCORE: score},
            )
        )
        if reached is None and score is not None and score >= mark:
            reached = len(trials)
    return reached or MOST, statistics.fmean(trial.state == "complete" for trial in trials[:EARLY])


def one_seed(record: Mapping, seed: int) -> dict[str, dict[str, tuple[int, float]]]:
    """By way and target."""
    tables = [Table(record, name) for name in record["data"]]
    space = space_of(record, seed)
    found: dict[str, dict[str, tuple[int, float]]] = {"chance": {}, "cold TPE": {}, "from siblings": {}}
    for table in tables:
        drawn = random.Random(f"{seed} {table.name} mark").sample(table.recipes, MARK_TRIALS)
        mark = max(score for recipe in drawn if (score := table.score(recipe)) is not None)
        ways = {
            "chance": by_chance(table, seed),
            "cold TPE": by_tpe(space, ()),
            "from siblings": by_tpe(space, siblings(tables, table, space, seed)),
        }
        for way, propose in ways.items():
            found[way][table.name] = search(table, propose, mark)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=10, help="how many, from 0")
    parser.add_argument("--out", type=Path, help="folder for results.json")
    arguments = parser.parse_args()
    record = json.loads(Path(__file__).with_name("table.json").read_text())
    began, runs = time.perf_counter(), {}
    for seed in range(arguments.seeds):
        runs[seed] = one_seed(record, seed)
        means = {way: statistics.fmean(n for n, _ in one.values()) for way, one in runs[seed].items()}
        told = ", ".join(f"{way} {mean:.1f}" for way, mean in means.items())
        print(f"seed {seed}: {told}; {time.perf_counter() - began:.0f} s", flush=True)
    counts, valid = (
        {
            way: {seed: statistics.fmean(one[k] for one in run[way].values()) for seed, run in runs.items()}
            for way in runs[0]
        }
        for k in (0, 1)
    )
    print(f"\n{len(runs)} seeds, {len(record['data'])} targets; mean +- half the 95 % interval over seeds\n")
    print("| search | trials to the best of 40 | against chance, paired | trials with a score |")
    print("|---|---|---|---|")
    for way, by_seed in counts.items():
        gap = None if way == "chance" else paired(by_seed, counts["chance"])
        own = as_text(estimate(list(by_seed.values())))
        rate = as_text(estimate([100 * value for value in valid[way].values()]))
        print(f"| {way} | {own} | {as_text(gap, sign='+')} | {rate} % |")
    gap = paired(counts["from siblings"], counts["cold TPE"])
    print(f"\nfrom siblings against cold TPE, paired: {as_text(gap, sign='+')} trials")
    print(f"{time.perf_counter() - began:.0f} s")
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "results.json").write_text(json.dumps(runs, indent=2) + "\n")


if __name__ == "__main__":
    main()
