"""`llava-kd ablate`: an ablation file run to its results, each stage a process of its own."""

from __future__ import annotations

import dataclasses
import shlex
import signal
import tempfile
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import yaml

from llava_kd.assembly.pipeline import command_words
from llava_kd.assembly.runs.children import Children
from llava_kd.assembly.runs.run_dir import locked
from llava_kd.assembly.runs.slots import CLI, Slots, environments
from llava_kd.assembly.runs.stopping import status_of_rest
from llava_kd.assembly.settings import load
from llava_kd.search.findings.elsewhere import keep_files, kept_files, read_elsewhere
from llava_kd.search.findings.grid_results import RESULTS, read_results
from llava_kd.search.findings.grid_tables import score_lines
from llava_kd.search.findings.words import duration
from llava_kd.search.findings.writing import write_results
from llava_kd.search.grids.grid import Grid, read_grid
from llava_kd.search.grids.manifest import keep_manifest, refuse_changes
from llava_kd.search.grids.sharing import ArmRun, Plan, StageRun, check_arms, make_plan
from llava_kd.search.running.pricing import Clock, price_text
from llava_kd.search.running.schedule import Job, Outcome, run_jobs
from llava_kd.search.running.work import faults, make_jobs, write_work


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What of the file this call runs; None: all of it, on all cores or GPUs.

    `elsewhere`: results files of the same grid from other machines; what they hold is not trained here.
    """

    output: str | None = None
    arms: Sequence[str] | None = None
    seeds: Sequence[int] | None = None
    num_jobs: int | None = None
    elsewhere: Sequence[Path] = ()


def ablate(path: str | Path, overrides: Sequence[str], choice: Choice, *, is_dry: bool = False) -> int:
    """Train what is missing, score it, write the results; with `is_dry` say what that would take.

    0, or 130 where Ctrl-C stopped it; the same call then goes on. Raises ValueError for a file that does not
    fit itself or what has run, and at the end where a stage failed, the others being finished.
    """
    grid = read_grid(path, overrides, output=choice.output)
    plan = make_plan(grid)
    check_arms(grid, plan, _settings)
    refuse_changes(grid, plan)
    elsewhere = read_elsewhere(grid, plan, [*choice.elsewhere, *kept_files(grid)])
    runs = _chosen(grid, plan, choice, {(one.arm, one.seed) for one in elsewhere})
    trees = [stage.tree for stage in plan.stages.values()]
    slots = environments(trees, choice.num_jobs, is_whole=grid.command is not None)
    results = grid.output / RESULTS
    if results.is_file():
        read_results(results)
    if is_dry:
        print(price_text(plan, runs, num_slots=len(slots)))
        return 0
    with locked(grid.output, "output"), Children() as children:
        keep_manifest(grid, plan)
        keep_files(grid, choice.elsewhere)
        write_work(grid, plan)
        train = (*CLI, "train") if grid.command is None else command_words(grid.command, grid.path)
        jobs = make_jobs(grid, plan, runs, train=train, evaluate=(*CLI, "eval"))
        if any(not job.is_done() for job in jobs):
            _prepare(grid, children)

        def write(outcome: Outcome) -> None:
            write_results(grid, plan, elsewhere, faults(plan, jobs, outcome))

        outcome = _run(plan, jobs, Slots(children, slots), write)
        write(outcome)
        return _end(grid, plan, jobs, outcome, children)


def _end(grid: Grid, plan: Plan, jobs: Sequence[Job], outcome: Outcome, children: Children) -> int:
    if (outcome.is_stopped or children.asked) and not all(job.is_done() for job in jobs):
        number = children.asked[0] if children.asked else signal.SIGTERM
        print(f"stopped by {signal.Signals(number).name}; run the same command again to continue", flush=True)
        return status_of_rest(number)
    for line in score_lines(read_results(grid.output / RESULTS)):
        print(line)
    print(f"open {grid.output / 'results.html'}", flush=True)
    if outcome.failed:
        names = {job.key: job.name for job in jobs}
        broken = faults(plan, jobs, outcome)
        first = next(iter(outcome.failed))
        raise ValueError(
            f"{len(outcome.failed)} of {len(jobs)} jobs failed, so {len(broken)} arms and seeds are not "
            f"finished: {', '.join(broken)}. The first: {names[first]} {outcome.failed[first]}; fix it, "
            "then run the same command again to continue"
        )
    return 0


def _settings(stage: StageRun) -> Mapping[str, object]:
    """All settings of a stage, those too that no file names. ValueError for what `train` would refuse."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / stage.recipe.name
        path.write_text(yaml.safe_dump(stage.tree), encoding="utf-8")
        try:
            return dataclasses.asdict(load(path))
        except ValueError as error:
            said = str(error).replace(str(path), str(stage.recipe))
            raise ValueError(f"stage {stage.label}: {said}") from error


def _chosen(grid: Grid, plan: Plan, choice: Choice, elsewhere: Set[tuple[str, int]]) -> list[ArmRun]:
    """The arms and seeds of this call in the order of the file, without those that are finished elsewhere."""
    for what, asked, known in (("arm", choice.arms, grid.arms), ("seed", choice.seeds, grid.seeds)):
        if unknown := [one for one in asked or () if one not in known]:
            listed = ", ".join(map(str, known))
            raise ValueError(f"{grid.path} has no {what} {unknown[0]}; name one of {listed}")
    arms = grid.arms if choice.arms is None else choice.arms
    seeds = grid.seeds if choice.seeds is None else choice.seeds
    asked = (run for run in plan.runs if run.arm in arms and run.seed in seeds)
    return [run for run in asked if (run.arm, run.seed) not in elsewhere]


def _prepare(grid: Grid, children: Children) -> None:
    for line in grid.prepare:
        words = shlex.split(line)
        print(f"llava-kd {line}", flush=True)
        status = children.run([*CLI, *words])
        if status != 0 and not children.asked:
            raise ValueError(f"{grid.path}: `prepare` failed with status {status}: llava-kd {line}")
    if not children.asked:
        for test in grid.tests.values():
            if not Path(test.data).is_file():
                raise ValueError(
                    f"{grid.path}: test {test.name}: the file {test.data} must exist after `prepare`; "
                    "correct the path"
                )


def _run(plan: Plan, jobs: Sequence[Job], slots: Slots, write: Callable[[Outcome], None]) -> Outcome:
    """A line for each job that ends; the results as they are then."""
    clock = Clock(plan, jobs, num_slots=len(slots.environments))

    def finished(job: Job, seconds: float, outcome: Outcome) -> None:
        clock.ended(job, seconds)
        rest = clock.left(outcome.settled())
        print(f"[{len(outcome.done)} of {len(jobs)}] {job.name}: {duration(seconds)}; {rest}", flush=True)
        if job.key not in plan.stages:
            write(outcome)

    def failed(job: Job, why: str) -> None:
        print(f"{job.name} {why}; jobs that do not need it continue", flush=True)

    return run_jobs(jobs, slots, num_slots=len(slots.environments), finished=finished, failed=failed)
