"""results.json of a grid: every arm's scores, its differences to the baseline, what it cost."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from llava_kd.search.findings.curves import run_record, stage_log, value_at
from llava_kd.search.findings.sameness import mixtures
from llava_kd.search.findings.scored import Scored, scored_here
from llava_kd.search.findings.statistics import estimate, paired, spearman
from llava_kd.search.findings.words import EQUALS, WAITING
from llava_kd.search.grids.grid import Arm, Grid
from llava_kd.search.grids.models import model_prints
from llava_kd.search.grids.sharing import ArmRun, Plan

VERSION = 1
RESULTS = "results.json"


def read_results(path: Path) -> dict:
    """ValueError for a file that is damaged, or of another version."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        version = results["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a results file ({error!r}); remove it, and it is written again"
        ) from error
    if version != VERSION:
        raise ValueError(
            f"{path} was written by another version (format {version}, this one reads {VERSION}); move it "
            "away, and it is written again from the runs"
        )
    return results


def collect(
    grid: Grid, plan: Plan, scored: Mapping[str, Sequence[Scored]], faults: Mapping[str, str]
) -> dict:
    """What results.json holds, from `all_scored`.

    `faults` by `fault_key`: why an arm and seed is not finished.
    """
    arms = {name: _arm(grid, plan, arm, scored, faults) for name, arm in grid.arms.items()}
    finished = [one for side in scored.values() for one in side]
    return {
        "version": VERSION,
        "name": grid.name,
        "what": grid.what,
        "seeds": list(grid.seeds),
        "baseline": grid.baseline,
        "tests": {
            name: {
                "data": test.data,
                "questions": _questions(finished, name),
                "sha256": file_print(test.data),
            }
            for name, test in grid.tests.items()
        },
        "curve": grid.curve,
        "models": model_prints(plan),
        "arms": arms,
        "cost": _cost(plan, finished),
        "rank": _rank(grid, scored),
        "commits": _commits(plan, finished),
        "warnings": mixtures(plan),
        "finished": [asdict(one) for one in finished],
    }


def file_print(path: str) -> str | None:
    """SHA-256 of a test file; None where it is not there yet."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if Path(path).is_file() else None


def fault_key(run: ArmRun) -> str:
    return f"{run.arm} seed {run.seed}"


def all_scored(grid: Grid, plan: Plan, elsewhere: Sequence[Scored]) -> dict[str, list[Scored]]:
    """By arm, in the order of the seeds. What was trained here counts before the same from elsewhere."""
    others = {(one.arm, one.seed): one for one in elsewhere}
    found: dict[str, list[Scored]] = {name: [] for name in grid.arms}
    for run in plan.runs:
        one = scored_here(plan, run, list(grid.tests), grid.curve) or others.get((run.arm, run.seed))
        if one is not None:
            found[run.arm].append(one)
    return found


def _arm(
    grid: Grid, plan: Plan, arm: Arm, scored: Mapping[str, Sequence[Scored]], faults: Mapping[str, str]
) -> dict:
    own, base = scored[arm.name], scored[grid.baseline]
    runs = {run.seed: run for run in plan.of(arm.name)}
    done = {one.seed for one in own}
    missing = {str(s): faults.get(fault_key(runs[s]), WAITING) for s in grid.seeds if s not in done}
    steps = sorted({one.curve.steps for one in own})
    entry: dict = {
        "what": arm.what,
        "published": arm.published,
        "stages": [{"label": stage.label, "recipe": str(stage.recipe)} for stage in arm.stages],
        "seeds": [one.seed for one in own],
        "missing": missing,
        "runs": {str(run.seed): list(run.chain) for run in runs.values()},
        "steps": steps[0] if len(steps) == 1 else None,
        "seconds": estimate([one.curve.seconds for one in own]) if own else None,
        "diagnostics": _diagnostics(own),
        "tests": {name: _test(name, own, base, is_baseline=arm.name == grid.baseline) for name in grid.tests},
    }
    if arm.name != grid.baseline:
        entry |= {name: _at_equal(grid, own, base, what) for name, what in EQUALS.items()}
    return entry


def _diagnostics(own: Sequence[Scored]) -> list[dict[str, float]]:
    """Of each stage in order: the figures of its last diagnosis, a mean over the seeds that have them."""
    stages = []
    for trained in zip(*(one.stages for one in own), strict=True):
        names = sorted(set().union(*(stage.diagnosis for stage in trained)))
        stages.append(
            {n: statistics.fmean(one.diagnosis[n] for one in trained if n in one.diagnosis) for n in names}
        )
    return stages


def _test(name: str, own: Sequence[Scored], base: Sequence[Scored], *, is_baseline: bool) -> dict | None:
    """Accuracies of a test file, by question type too, and the differences where it is not the baseline."""
    if not own:
        return None
    by_seed = {one.seed: one.scores[name].accuracy for one in own}
    of_base = {one.seed: one.scores[name].accuracy for one in base}
    kinds = sorted({kind for one in own for kind in one.scores[name].by_type})
    found: dict = {
        "accuracy": estimate(list(by_seed.values())),
        "by_seed": {str(seed): value for seed, value in by_seed.items()},
        "by_type": {kind: estimate(list(_of_type(own, name, kind).values())) for kind in kinds},
    }
    if not is_baseline:
        found["gain"] = paired(by_seed, of_base)
        found["gain_by_type"] = {
            kind: paired(_of_type(own, name, kind), _of_type(base, name, kind)) for kind in kinds
        }
    return found


def _of_type(scored: Sequence[Scored], test: str, kind: str) -> dict[int, float]:
    return {one.seed: one.scores[test].by_type[kind] for one in scored if kind in one.scores[test].by_type}


def _at_equal(grid: Grid, own: Sequence[Scored], base: Sequence[Scored], what: str) -> dict:
    """The difference when both have had what the baseline took of `what`, a field of a curve; else why not.

    At equal steps the finished students are compared on the first test; all else is read from the curve.
    """
    partners = {one.seed: one.curve for one in base}
    pairs = {one.seed: (one.curve, partners[one.seed]) for one in own if one.seed in partners}
    if not pairs:
        return _none("no seed finished in both arms")
    if what == "steps" and all(mine.steps == its.steps for mine, its in pairs.values()):
        test = next(iter(grid.tests))
        values, others = ({s.seed: s.scores[test].accuracy for s in side} for side in (own, base))
        return {"gain": paired(values, others), "figure": f"test {test}", "not_measured": None}
    if grid.curve is None:
        return _none("no slice is evaluated during training")
    gaps: list[float] = []
    for mine, its in pairs.values():
        if (most := getattr(its, what)) is None or getattr(mine, what) is None:
            return _none("some logs do not have the operations")
        value, other = value_at(mine, what, most), value_at(its, what, most)
        if value is None or other is None:
            whose = "this arm" if value is None else "the baseline"
            return _none(f"{grid.curve} of {whose} was not evaluated by then")
        gaps.append(value - other)
    return {"gain": estimate(gaps), "figure": grid.curve, "not_measured": None}


def _none(why: str) -> dict:
    return {"gain": None, "figure": None, "not_measured": why}


def _cost(plan: Plan, finished: Sequence[Scored]) -> dict:
    """Training seconds of what is finished: each stage once, and what arms saved by sharing some."""
    seconds = {stage.key: stage.seconds for one in finished for stage in one.stages}
    complete = {key for key, stage in plan.stages.items() if stage.is_complete}
    for key in complete:
        if lines := stage_log(plan.stages[key].directory):
            seconds[key] = lines[-1].seconds
    whole = [run for run in plan.runs if seconds.keys() >= set(run.chain)]
    each = [seconds[key] for run in whole for key in run.chain]
    return {
        "stages": len(plan.stages),
        "finished": len(complete | {key for one in finished for key in one.chain}),
        "seconds": sum(seconds.values()),
        "saved_by_sharing": sum(each) - sum(seconds[key] for key in {k for run in whole for k in run.chain}),
    }


def _rank(grid: Grid, scored: Mapping[str, Sequence[Scored]]) -> dict | None:
    """Agreement with the published order on the first test: of the means, and of seeds with all arms.

    The means are those of the same seeds in every arm; of each arm's own seeds while none has every arm.
    """
    test = next(iter(grid.tests))
    published = {
        name: arm.published for name, arm in grid.arms.items() if arm.published is not None and scored[name]
    }
    if not published:
        return None
    by_arm = {name: {one.seed: one.scores[test].accuracy for one in scored[name]} for name in published}
    seeds = [seed for seed in grid.seeds if all(seed in values for values in by_arm.values())]
    taken = [[values[seed] for seed in seeds or values] for values in by_arm.values()]
    # Rounded, as two sums of the same scores may differ in their last digit, and equal arms share a rank.
    means = [round(sum(values) / len(values), 9) for values in taken]
    return {
        "test": test,
        "arms": len(published),
        "spearman": spearman(means, list(published.values())),
        "by_seed": {
            str(seed): spearman([values[seed] for values in by_arm.values()], list(published.values()))
            for seed in seeds
        },
    }


def _questions(finished: Sequence[Scored], test: str) -> int | None:
    return next((one.scores[test].count for one in finished), None)


def _commits(plan: Plan, finished: Sequence[Scored]) -> list[str]:
    """Of all finished stages, each once."""
    records = [run_record(stage.directory) for stage in plan.stages.values()]
    here = {str(record["commit"]) for record in records if record and record.get("commit")}
    return sorted(here | {stage.commit for one in finished for stage in one.stages if stage.commit})
