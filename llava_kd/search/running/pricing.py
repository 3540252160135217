"""What is left to train, and how long it may take, judged by stages of the same kind that are finished."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from llava_kd.search.findings.curves import stage_log
from llava_kd.search.findings.words import duration
from llava_kd.search.grids.sharing import ArmRun, Plan, StageRun
from llava_kd.search.running.schedule import Job


@dataclass(frozen=True, kw_only=True)
class Price:
    """Of one stage: the steps that are left and their seconds; None where not known."""

    stage: StageRun
    steps: int | None
    seconds: float | None


class Rates:
    """Seconds a step, by what a stage does; a recipe's own where that very kind has not run yet."""

    def __init__(self, plan: Plan) -> None:
        self._by_kind: dict[str, list[float]] = {}
        self._by_recipe: dict[str, list[float]] = {}
        for stage in plan.stages.values():
            self.learn(stage)

    def learn(self, stage: StageRun) -> None:
        """Take in what the log of a stage says; one that has just begun says nothing."""
        lines = stage_log(stage.directory)
        if not lines or not lines[-1].step:
            return
        rate = lines[-1].seconds / lines[-1].step
        self._by_kind.setdefault(stage.kind, []).append(rate)
        self._by_recipe.setdefault(_recipe_key(stage), []).append(rate)

    def of(self, stage: StageRun) -> float | None:
        found = self._by_kind.get(stage.kind) or self._by_recipe.get(_recipe_key(stage))
        return _mean(found) if found else None

    @property
    def mean(self) -> float | None:
        """Of all stages that have run."""
        found = [rate for rates in self._by_kind.values() for rate in rates]
        return _mean(found) if found else None


def _recipe_key(stage: StageRun) -> str:
    return f"{stage.recipe} {stage.tree.get('teacher') is not None}"


def price(stage: StageRun, rates: Rates) -> Price:
    """Of a complete stage nothing; of one that was broken off, what its log does not have."""
    if stage.is_complete:
        return Price(stage=stage, steps=0, seconds=0.0)
    if stage.steps is None:
        return Price(stage=stage, steps=None, seconds=None)
    lines = stage_log(stage.directory)
    left = max(0, stage.steps - (lines[-1].step if lines else 0))
    rate = rates.of(stage)
    return Price(stage=stage, steps=left, seconds=None if rate is None else left * rate)


def price_text(plan: Plan, wanted: Sequence[ArmRun], *, num_slots: int) -> str:
    """What `--dry_run` says: every stage of one seed, then the whole."""
    if not wanted:
        return "nothing to train: all of it is finished"
    rates = Rates(plan)
    arms, seeds = (list(dict.fromkeys(getattr(run, what) for run in wanted)) for what in ("arm", "seed"))
    keys = list(dict.fromkeys(key for run in wanted for key in run.chain))
    prices = {key: price(plan.stages[key], rates) for key in keys}
    whole = len(wanted) == len(arms) * len(seeds)
    what = f"{len(arms)} arms x {len(seeds)} seeds" if whole else f"{len(wanted)} pairs of an arm and a seed"
    alone = sum(len(run.chain) for run in wanted)
    first = {plan.line_of(key, "kind"): key for key in reversed(keys)}
    rows = [["stage", "after", "steps", "arms", "state of its seeds", "seconds a step"]]
    for key in reversed(first.values()):
        rows.append(_row(plan, plan.stages[key], keys, arms, rates))
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    left = [price for price in prices.values() if price.steps != 0]
    begun = sum(price.stage.has_begun for price in left)
    lines += [
        "",
        f"{what}: {len(keys)} stages ({alone} without sharing); "
        f"{len(keys) - len(left)} finished, {begun} started, {len(left) - begun} new",
        f"to train: {_steps_text(left)}; {_seconds_text(left, num_slots)}",
    ]
    return "\n".join(lines)


def _row(plan: Plan, stage: StageRun, keys: Sequence[str], arms: Sequence[str], rates: Rates) -> list[str]:
    same = [plan.stages[k] for k in keys if plan.line_of(k, "kind") == plan.line_of(stage.key, "kind")]
    done = sum(other.is_complete for other in same)
    begun = sum(other.has_begun and not other.is_complete for other in same)
    state = [f"{done} finished"] * bool(done) + [f"{begun} started"] * bool(begun)
    state += [f"{len(same) - done - begun} new"] * bool(len(same) - done - begun)
    rate = rates.of(stage)
    users = [run.arm for run in plan.users(stage.key) if run.arm in arms]
    return [
        stage.label,
        "-" if stage.parent is None else ", ".join(plan.line_of(stage.parent, "label")),
        "by epochs" if stage.steps is None else f"{stage.steps:,}",
        ", ".join(users) if len(users) < 3 else f"{len(users)} arms",
        ", ".join(state),
        "unknown" if rate is None else f"{rate:.3f}",
    ]


def _steps_text(left: Sequence[Price]) -> str:
    known = sum(price.steps or 0 for price in left)
    open_ = sum(price.steps is None for price in left)
    return f"{known:,} steps" + (f" and {open_} stages set by epochs" if open_ else "")


def _seconds_text(left: Sequence[Price], num_slots: int) -> str:
    if any(price.seconds is None for price in left):
        return "time unknown until a stage of each kind has run"
    seconds = sum(price.seconds or 0.0 for price in left)
    return f"about {duration(seconds)} of training, {duration(seconds / num_slots)} on {num_slots} at once"


class Clock:
    """How long what is left may take, from the jobs that have ended in this call and the logs of all."""

    def __init__(self, plan: Plan, jobs: Sequence[Job], *, num_slots: int) -> None:
        self._plan = plan
        self._jobs = jobs
        self._num_slots = num_slots
        self._beside: list[float] = []  # seconds of a stage's process that are not steps: starting, saving
        self._scoring: list[float] = []

    def ended(self, job: Job, seconds: float) -> None:
        stage = self._plan.stages.get(job.key)
        if stage is None:
            self._scoring.append(seconds)
            return
        lines = stage_log(stage.directory)
        self._beside.append(max(0.0, seconds - (lines[-1].seconds if lines else 0.0)))

    def left(self, settled: AbstractSet[str]) -> str:
        """In the line that ends a job."""
        jobs = [job for job in self._jobs if job.key not in settled]
        stages = [self._plan.stages[job.key] for job in jobs if job.key in self._plan.stages]
        if not jobs:
            return "nothing left"
        rates = Rates(self._plan)
        training = [s for stage in stages if (s := self._seconds(stage, rates)) is not None]
        if len(training) < len(stages):
            return f"{len(jobs)} left, time unknown"
        scoring = len(jobs) - len(stages)
        seconds = sum(training) + _mean(self._beside) * len(stages) + _mean(self._scoring) * scoring
        beside = f" and {scoring} to score" if scoring and not self._scoring else ""
        return f"{len(jobs)} left, about {duration(seconds / min(self._num_slots, len(jobs)))}{beside}"

    def _seconds(self, stage: StageRun, rates: Rates) -> float | None:
        """Of what is left of it; one of a kind that has not run yet is taken to be as fast as the others."""
        left = price(stage, rates)
        if left.steps is None or left.seconds is not None or rates.mean is None:
            return left.seconds
        return left.steps * rates.mean


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
