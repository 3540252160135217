"""An ablation file, as docs/ablations.md writes it down: arms, their stages, seeds, test files."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_kd.config.trees import check_kind, parse_override, read_tree, set_dotted
from llava_kd.search.grids.entries import listed, mapping, named, near, only

_KEYS = {
    *(
        "name",
        "what",
        "output",
        "seeds",
        "baseline",
        "prepare",
        "common",
        "stages",
        "arms",
        "tests",
        "curve",
        "command",
    )
}
_OF_ARM = {"stages", "published", "what"}
_OF_STAGE = {"stage", "recipe", "overrides", "label"}
_OF_TEST = {"data", "images", "max_new_tokens"}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of an arm: a recipe with everything that is changed in it, before its seed and its parent."""

    label: str
    recipe: Path
    tree: Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way to train: stages that follow each other. `published` is what somebody else reports for it."""

    name: str
    stages: tuple[Stage, ...]
    published: float | None = None
    what: str = ""


@dataclass(frozen=True, kw_only=True)
class TestFile:
    """A LLaVA JSON file that the student of every arm answers."""

    name: str
    data: str
    images: str | None = None
    max_new_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Grid:
    """`prepare`: `llava-kd` commands that come first. `curve`: a figure of metrics.jsonl, if there is one.

    `command` starts a stage, its file follows; None: `llava-kd train` on one process.
    """

    name: str
    path: Path
    output: Path
    what: str
    seeds: tuple[int, ...]
    baseline: str
    arms: Mapping[str, Arm]
    tests: Mapping[str, TestFile]
    prepare: tuple[str, ...]
    command: str | None
    curve: str | None


def read_grid(path: str | Path, overrides: Sequence[str] = (), *, output: str | None = None) -> Grid:
    """Read an ablation file; `overrides` such as `--max_steps=20` go to every stage of every arm.

    Raises ValueError for keys that are not known, a recipe or a baseline that is not there, a seed or an arm
    that comes twice.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no ablation file {path}; see the examples in ablations/")
    tree = read_tree(path)
    check_kind(tree, "grid", path)
    only(tree, _KEYS, f"{path}")
    for key in ("arms", "seeds", "baseline", "tests"):
        if not tree.get(key):
            raise ValueError(f"{path} must contain `{key}`; docs/ablations.md shows an example")
    name = named(tree.get("name") or path.stem, f"{path}: `name`")
    shared = _Shared(
        path=path,
        stages=mapping(tree.get("stages"), f"{path}: `stages`"),
        first=mapping(tree.get("common"), f"{path}: `common`"),
        last=dict(map(parse_override, overrides)),
    )
    arms = {key: _arm(key, entry, shared) for key, entry in mapping(tree["arms"], f"{path}: `arms`").items()}
    baseline = str(tree["baseline"])
    if baseline not in arms:
        raise ValueError(f"{path}: `baseline` is {baseline}, which is not an arm{near(baseline, arms)}")
    tests = {
        key: _test(key, entry, path) for key, entry in mapping(tree["tests"], f"{path}: `tests`").items()
    }
    curve = tree.get("curve") or _only_slice(arms[baseline])
    return Grid(
        name=name,
        path=path,
        output=Path(output or str(tree.get("output") or f"runs/ablations/{name}")),
        what=str(tree.get("what") or ""),
        seeds=_seeds(tree["seeds"], path),
        baseline=baseline,
        arms=arms,
        tests=tests,
        prepare=tuple(map(str, listed(tree.get("prepare"), f"{path}: `prepare`"))),
        command=None if tree.get("command") is None else str(tree["command"]),
        curve=None if curve is None else str(curve),
    )


@dataclass(frozen=True, kw_only=True)
class _Shared:
    """What the stages of all arms draw on; `first` and `last` are set before and after their overrides."""

    path: Path
    stages: Mapping
    first: Mapping
    last: Mapping


def _arm(name: object, entry: object, shared: _Shared) -> Arm:
    where = f"{shared.path}: arm {name}"
    arm = {"stages": entry} if isinstance(entry, list) else mapping(entry, where)
    only(arm, _OF_ARM, where)
    stages = arm.get("stages")
    if not isinstance(stages, list) or not stages:
        raise ValueError(f"{where} must list its `stages`, in order; got {stages!r}")
    published = arm.get("published")
    if published is not None and (isinstance(published, bool) or not isinstance(published, int | float)):
        raise ValueError(f"{where}: `published` must be a number, got {published!r}")
    return Arm(
        name=named(name, f"{shared.path}: an arm"),
        stages=tuple(_stage(entry, shared, f"{where}, stage {k}") for k, entry in enumerate(stages, 1)),
        published=published,
        what=str(arm.get("what") or ""),
    )


def _stage(entry: object, shared: _Shared, where: str) -> Stage:
    """`NAME` of the file's stages, that name with more overrides, or a recipe of its own."""
    own = {"stage": entry} if isinstance(entry, str) else mapping(entry, where)
    only(own, _OF_STAGE, where)
    if ("stage" in own) == ("recipe" in own):
        raise ValueError(f"{where} must name either a `stage` of the file or a `recipe`; got {entry!r}")
    named: Mapping = {}
    if "stage" in own:
        name = own["stage"]
        if name not in shared.stages:
            raise ValueError(f"{where} is {name}, which is not in `stages`{near(name, shared.stages)}")
        named = mapping(shared.stages[name], f"{shared.path}: stage {name}")
        only(named, {"recipe", "overrides"}, f"{shared.path}: stage {name}")
    recipe = _recipe((named or own).get("recipe"), shared.path, where)
    tree = read_tree(recipe)
    changes = [named.get("overrides"), own.get("overrides")]
    for part in (shared.first, *(mapping(c, f"{where}: `overrides`") for c in changes), shared.last):
        for key, value in part.items():
            set_dotted(tree, str(key), copy.deepcopy(value))
    return Stage(label=str(own.get("label") or own.get("stage") or recipe.stem), recipe=recipe, tree=tree)


def _recipe(name: object, path: Path, where: str) -> Path:
    found = path.parent / str(name)
    if name is None or not found.is_file():
        beside = found.parent
        there = [file.name for file in sorted(beside.glob("*.yaml"))] if beside.is_dir() else []
        raise ValueError(f"{where}: there is no recipe {found}{near(found.name, there)}")
    return found


def _test(name: object, entry: object, path: Path) -> TestFile:
    where = f"{path}: test {name}"
    own = {"data": entry} if isinstance(entry, str) else mapping(entry, where)
    only(own, _OF_TEST, where)
    if not own.get("data"):
        raise ValueError(f"{where} must name `data`, a LLaVA JSON file")
    limit = own.get("max_new_tokens")
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise ValueError(f"{where}: `max_new_tokens` must be a whole number, at least 1; got {limit!r}")
    images = own.get("images")
    return TestFile(
        name=named(name, f"{path}: a test"),
        data=str(own["data"]),
        images=None if images is None else str(images),
        max_new_tokens=limit,
    )


def _seeds(entry: object, path: Path) -> tuple[int, ...]:
    seeds = listed(entry, f"{path}: `seeds`")
    odd = [seed for seed in seeds if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0]
    if odd:
        raise ValueError(f"{path}: `seeds` must be whole numbers from 0; got {odd}")
    if doubled := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
        raise ValueError(f"{path}: `seeds` must name each seed once; {doubled} is there twice")
    return tuple(seeds)


def _only_slice(arm: Arm) -> str | None:
    """The first slice that the arm's last stage asks while it trains."""
    evaluate = arm.stages[-1].tree.get("evaluate")
    slices = evaluate.get("slices") if isinstance(evaluate, Mapping) else None
    return f"slice/{next(iter(slices))}" if isinstance(slices, Mapping) and slices else None
