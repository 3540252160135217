"""A grid as jobs: the files that they read, the commands that they are, what a failure means for an arm."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from llava_kd.durable import make_folder, write_text
from llava_kd.search.findings.grid_results import fault_key
from llava_kd.search.grids.grid import Grid
from llava_kd.search.grids.sharing import ArmRun, Plan
from llava_kd.search.running.schedule import Job, Outcome


def recipe_file(grid: Grid, key: str) -> Path:
    return grid.output / "recipes" / f"{key}.yaml"


def write_work(grid: Grid, plan: Plan) -> None:
    """The settings of every stage, and for every arm and seed where its stages are."""
    for key, stage in plan.stages.items():
        _write(recipe_file(grid, key), yaml.safe_dump(dict(stage.tree), sort_keys=False))
    for run in plan.runs:
        stages = [
            {
                "label": plan.stages[key].label,
                "run": str(Path("../../../stages") / key),
                "recipe": str(Path("../../../recipes") / f"{key}.yaml"),
                "shared_with": sorted({user.arm for user in plan.users(key)} - {run.arm}),
            }
            for key in run.chain
        ]
        record = {"arm": run.arm, "seed": run.seed, "stages": stages}
        _write(run.directory / "arm.json", json.dumps(record, indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    """Unless it says that already."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        make_folder(path.parent)
        write_text(path, text)


def make_jobs(
    grid: Grid, plan: Plan, runs: Sequence[ArmRun], *, train: Sequence[str], evaluate: Sequence[str]
) -> list[Job]:
    """The stages of `runs`, each once, and an evaluation for every test; parents before what needs them."""
    jobs: dict[str, Job] = {}
    for run in runs:
        for key in run.chain:
            if key not in jobs:
                jobs[key] = _training(grid, plan, key, train)
        for test in grid.tests:
            job = _scoring(grid, plan, run, test, evaluate)
            jobs[job.key] = job
    return list(jobs.values())


def _training(grid: Grid, plan: Plan, key: str, train: Sequence[str]) -> Job:
    stage = plan.stages[key]
    return Job(
        key=key,
        name=f"{', '.join(plan.line_of(key, 'label'))}, seed {stage.seed}",
        needs=() if stage.parent is None else (stage.parent,),
        command=(*train, str(recipe_file(grid, key))),
        log=grid.output / "logs" / f"{key}.log",
        is_done=lambda: stage.is_complete,
    )


def _scoring(grid: Grid, plan: Plan, run: ArmRun, name: str, evaluate: Sequence[str]) -> Job:
    test, last = grid.tests[name], plan.stages[run.chain[-1]]
    out = run.directory / "eval" / name
    words = ["--model", str(last.directory / "model"), "--data", test.data, "--out", str(out)]
    if test.images is not None:
        words += ["--images", test.images]
    if test.max_new_tokens is not None:
        words += ["--max_new_tokens", str(test.max_new_tokens)]
    return Job(
        key=f"eval {run.arm} {run.seed} {name}",
        name=f"{name} of {run.arm}, seed {run.seed}",
        needs=(last.key,),
        command=(*evaluate, *words),
        log=grid.output / "logs" / f"eval-{run.arm}-seed{run.seed}-{name}.log",
        is_done=lambda: (out / "summary.json").is_file(),
    )


def faults(plan: Plan, jobs: Sequence[Job], outcome: Outcome) -> dict[str, str]:
    """Why an arm and seed is not finished, where something failed; as `collect` takes it."""
    names = {job.key: job.name for job in jobs}
    found: dict[str, str] = {}
    for run in plan.runs:
        scoring = [key for key in outcome.failed if key.startswith(f"eval {run.arm} {run.seed} ")]
        broken = [key for key in (*run.chain, *scoring) if key in outcome.failed]
        if broken:
            failed = broken[0]
            kind = (
                "failed" if failed in (run.chain[-1], *scoring) else "not run because an earlier stage failed"
            )
            found[fault_key(run)] = f"{kind}: {names[failed]} {outcome.failed[failed]}"
    return found
