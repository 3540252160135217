"""Which stages a grid trains: one for each difference in settings, parents or seed, shared by its arms.

OUT/stages/HASH/                run directory of one stage, as of `llava-kd train`
OUT/recipes/HASH.yaml           its settings; `llava-kd train` of that file runs it by hand
OUT/logs/HASH.log               what it said
OUT/arms/NAME/seedN/arm.json    the stages of an arm, in order
OUT/arms/NAME/seedN/eval/TEST/  its answers and scores
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llava_kd.search.grids.grid import Arm, Grid, Stage

# Where a stage writes, and what it says meanwhile: two stages that differ in these alone are one.
NEUTRAL = (
    *("output_dir", "log", "evaluate", "checkpoint.every", "checkpoint.keep", "engine.timeout_minutes"),
    *("data.num_workers", "data.image_cache_mb", "data.max_bad_rate", "micro_batch_size"),
)
_PREFIXES = tuple(f"{name}." for name in NEUTRAL)
_NEW_STUDENT = ("vision_tower", "language_model", "projector")


@dataclass(frozen=True, kw_only=True)
class StageRun:
    """One training. `tree` is whole: with its seed, its output_dir and the model of its parent."""

    key: str
    label: str
    recipe: Path
    seed: int
    parent: str | None
    tree: Mapping[str, object]
    directory: Path
    kind: str  # the same for every seed, and whatever the parent

    @property
    def is_complete(self) -> bool:
        return (self.directory / "run.json").is_file()

    @property
    def has_begun(self) -> bool:
        """One that stopped before its first step, over a mistake in its settings or data, has not."""
        return any((self.directory / name).exists() for name in ("metrics.jsonl", "checkpoints", "run.json"))

    @property
    def steps(self) -> int | None:
        """None where `epochs` decides it."""
        steps = self.tree.get("max_steps")
        return steps if isinstance(steps, int) else None


@dataclass(frozen=True, kw_only=True)
class ArmRun:
    """An arm with one seed: the keys of its stages, and where its answers go."""

    arm: str
    seed: int
    chain: tuple[str, ...]
    directory: Path


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`stages` by key, parents before their children; `runs` of every arm and seed."""

    stages: Mapping[str, StageRun]
    runs: tuple[ArmRun, ...]

    def users(self, key: str) -> list[ArmRun]:
        return [run for run in self.runs if key in run.chain]

    def line_of(self, key: str, what: Literal["label", "kind"]) -> tuple[str, ...]:
        """Of a stage and all before it, the first one first."""
        stage = self.stages[key]
        before = () if stage.parent is None else self.line_of(stage.parent, what)
        return (*before, stage.label if what == "label" else stage.kind)

    def root(self, key: str) -> str:
        """The first stage of its chain."""
        parent = self.stages[key].parent
        return key if parent is None else self.root(parent)

    def of(self, arm: str) -> list[ArmRun]:
        return [run for run in self.runs if run.arm == arm]


def make_plan(grid: Grid) -> Plan:
    """Every stage once. Seed by seed, so that a grid that is broken off has whole rows to compare."""
    stages: dict[str, StageRun] = {}
    runs = []
    for seed in grid.seeds:
        for arm in grid.arms.values():
            chain = _chain(arm, seed, grid.output)
            stages |= {run.key: run for run in chain if run.key not in stages}
            where = grid.output / "arms" / arm.name / f"seed{seed}"
            keys = tuple(run.key for run in chain)
            runs.append(ArmRun(arm=arm.name, seed=seed, chain=keys, directory=where))
    return Plan(stages=stages, runs=tuple(runs))


def _chain(arm: Arm, seed: int, output: Path) -> list[StageRun]:
    chain: list[StageRun] = []
    for stage in arm.stages:
        parent = chain[-1] if chain else None
        tree = _tree(stage, seed, parent)
        settings = own_settings(tree, is_first=parent is None)
        key = _hash({**settings, "seed": seed}, "" if parent is None else parent.key)
        directory = output / "stages" / key
        tree["output_dir"] = str(directory)
        run = StageRun(
            key=key,
            label=stage.label,
            recipe=stage.recipe,
            seed=seed,
            parent=None if parent is None else parent.key,
            tree=tree,
            directory=directory,
            kind=_hash(settings, ""),
        )
        chain.append(run)
    return chain


def _tree(stage: Stage, seed: int, parent: StageRun | None) -> dict[str, object]:
    tree = {**copy.deepcopy(dict(stage.tree)), "seed": seed}
    log = tree.get("log")
    tree["log"] = {**(log if isinstance(log, Mapping) else {}), "progress": False}
    if parent is not None:
        student = tree.get("student")
        kept = {
            k: v
            for k, v in (student if isinstance(student, Mapping) else {}).items()
            if k not in _NEW_STUDENT
        }
        tree["student"] = {**kept, "checkpoint": str(parent.directory / "model")}
    return tree


def own_settings(tree: Mapping[str, object], *, is_first: bool) -> dict[str, object]:
    """What decides its result beside the seed and, where it is not the first, its parent."""
    left_out = {"seed"} if is_first else {"seed", "student.checkpoint"}
    return {key: value for key, value in deciding(tree).items() if key not in left_out}


def deciding(tree: Mapping[str, object]) -> dict[str, object]:
    """What decides the result of a stage, by dotted names."""
    return {key: value for key, value in flat(tree).items() if not f"{key}.".startswith(_PREFIXES)}


def flat(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Dotted names; a section without any setting keeps its name."""
    found: dict[str, object] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _hash(settings: Mapping[str, object], parent: str) -> str:
    text = json.dumps([settings, parent], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_arms(grid: Grid, plan: Plan, settings: Callable[[StageRun], Mapping[str, object]]) -> None:
    """Refuse arms that differ in nothing, and what `settings` refuses; it adds what a file leaves out."""
    seen: dict[str, str] = {}
    read = {
        run.key: own_settings(settings(run), is_first=run.parent is None)
        for run in plan.stages.values()
        if run.seed == grid.seeds[0]
    }
    for run in plan.runs:
        if run.seed != grid.seeds[0]:
            continue
        same = json.dumps([read[key] for key in run.chain], sort_keys=True, default=str)
        if same in seen:
            raise ValueError(
                f"{grid.path}: the arms {seen[same]} and {run.arm} must differ, but have the same "
                "settings; change one, or leave it out"
            )
        seen[same] = run.arm
