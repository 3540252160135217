"""A finished arm with one seed: scores, learning curve and stages, from its runs or from a results file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_kd.evaluation.report.results import read_evaluated
from llava_kd.search.findings.curves import Curve, Point, chain_curve, last_diagnosis, run_record, stage_log
from llava_kd.search.grids.sharing import ArmRun, Plan


@dataclass(frozen=True, kw_only=True)
class Score:
    """Fractions of right answers to one test file, and how many questions it has."""

    accuracy: float
    by_type: Mapping[str, float]
    count: int


@dataclass(frozen=True, kw_only=True)
class TrainedStage:
    """`key` in the plan, seconds of training steps, and the figures of the last diagnosis."""

    key: str
    seconds: float
    commit: str | None
    diagnosis: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """`scores` by test; `stages` in order; `curve` over all of them."""

    arm: str
    seed: int
    scores: Mapping[str, Score]
    stages: tuple[TrainedStage, ...]
    curve: Curve

    @property
    def chain(self) -> tuple[str, ...]:
        return tuple(stage.key for stage in self.stages)


def scored_here(plan: Plan, run: ArmRun, tests: Sequence[str], figure: str | None) -> Scored | None:
    """What the run directories of an arm and seed hold; None until every test has been scored."""
    where = {name: run.directory / "eval" / name for name in tests}
    if not all((path / "summary.json").is_file() for path in where.values()):
        return None
    directories = [plan.stages[key].directory for key in run.chain]
    return Scored(
        arm=run.arm,
        seed=run.seed,
        scores={name: _score(path) for name, path in where.items()},
        stages=tuple(_stage(key, path) for key, path in zip(run.chain, directories, strict=True)),
        curve=chain_curve(directories, figure),
    )


def _score(directory: Path) -> Score:
    found = read_evaluated(directory)
    return Score(accuracy=found.accuracy, by_type=found.by_type, count=found.count)


def _stage(key: str, directory: Path) -> TrainedStage:
    lines = stage_log(directory)
    commit = (run_record(directory) or {}).get("commit")
    return TrainedStage(
        key=key,
        seconds=lines[-1].seconds if lines else 0.0,
        commit=None if commit is None else str(commit),
        diagnosis=last_diagnosis(directory),
    )


def from_json(record: Mapping) -> Scored:
    """The inverse of `dataclasses.asdict`. KeyError, TypeError or ValueError for anything else."""
    curve = record["curve"]
    return Scored(
        arm=str(record["arm"]),
        seed=int(record["seed"]),
        scores={str(name): Score(**score) for name, score in record["scores"].items()},
        stages=tuple(TrainedStage(**stage) for stage in record["stages"]),
        curve=Curve(**{**curve, "points": tuple(Point(**point) for point in curve["points"])}),
    )
