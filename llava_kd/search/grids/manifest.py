"""What a grid has begun: arms and seeds may be added to it later, what has run may not become another."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from llava_kd.durable import make_folder, write_text
from llava_kd.search.grids.grid import Grid
from llava_kd.search.grids.models import model_prints
from llava_kd.search.grids.sharing import Plan, own_settings

VERSION = 1
MANIFEST = "ablation.json"


def keep_manifest(grid: Grid, plan: Plan) -> None:
    """Write what this call may begin, beside what earlier ones did."""
    before = read_manifest(grid.output)
    arms = dict(before["arms"]) if before else {}
    for name, entry in json.loads(json.dumps(_arms(plan), default=str)).items():
        same = arms.get(name, {}).get("settings") == entry["settings"]
        arms[name] = {**entry, "stages": {**(arms[name]["stages"] if same else {}), **entry["stages"]}}
    tests = {name: asdict(test) for name, test in grid.tests.items()}
    record = {
        "version": VERSION,
        "name": grid.name,
        "arms": arms,
        "tests": {**(before["tests"] if before else {}), **tests},
        "models": {**(before["models"] if before else {}), **model_prints(plan)},
    }
    make_folder(grid.output)
    write_text(grid.output / MANIFEST, json.dumps(record, indent=1, default=str) + "\n")


def refuse_changes(grid: Grid, plan: Plan) -> None:
    """ValueError for arms and tests that have begun with other settings, naming each; more may come."""
    before = read_manifest(grid.output)
    if before is None:
        return
    if before["name"] != grid.name:
        raise ValueError(
            f"{grid.output} contains the ablation {before['name']}, not {grid.name}; name another `output`"
        )
    arms = json.loads(json.dumps(_arms(plan), default=str))
    faults = [
        f"arm {name} ({change})"
        for name, entry in arms.items()
        if name in before["arms"] and (change := _change(before["arms"][name], entry, grid.output))
    ]
    for name, test in grid.tests.items():
        began = any(grid.output.glob(f"arms/*/seed*/eval/{name}/run.json"))
        if began and name in before["tests"] and before["tests"][name] != asdict(test):
            faults.append(f"test {name} ({_first(before['tests'][name], asdict(test))})")
    if any(_has_begun(run) for run in grid.output.glob("stages/*")):
        now = model_prints(plan)
        faults += [
            f"model {p} (other files)" for p, old in before["models"].items() if now.get(p, old) != old
        ]
    if faults:
        raise ValueError(
            f"{grid.path} was changed after its first run: {'; '.join(faults)}. Undo the change, use a new "
            "name for what changed (finished runs stay), or name another `output`"
        )


def read_manifest(output: Path) -> dict | None:
    return read_record(output / MANIFEST, VERSION)


def read_record(path: Path, reads: int, check: Callable[[dict], None] = lambda record: None) -> dict | None:
    """The JSON record of a grid or a search, None where there is none yet.

    `check`: raises ValueError, KeyError or TypeError for what a record of the version `reads` may not hold.
    Raises ValueError for a damaged record, and for one of another version.
    """
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version = record["version"]
        if version == reads:
            check(record)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); restore it, or name another `output`") from error
    if version != reads:
        raise ValueError(
            f"{path} was written by another version (format {version}, this one reads {reads}); name "
            "another `output`, or use the version that wrote it"
        )
    return record


def _arms(plan: Plan) -> dict[str, dict]:
    """By arm: what decides each of its stages, and the keys of those by seed."""
    arms: dict[str, dict] = {}
    for run in plan.runs:
        chain = [plan.stages[key] for key in run.chain]
        settings = [own_settings(stage.tree, is_first=stage.parent is None) for stage in chain]
        entry = arms.setdefault(
            run.arm, {"labels": [s.label for s in chain], "settings": settings, "stages": {}}
        )
        entry["stages"][str(run.seed)] = list(run.chain)
    return arms


def _change(before: Mapping, now: Mapping, output: Path) -> str:
    """How the first stage differs that is not what it was; nothing where that stage has not begun."""
    old, new = before["settings"], now["settings"]
    place = next(
        (k for k, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new))
    )
    if place == len(old) == len(new):
        return ""
    deciding = min(place, len(old) - 1)
    keys = [chain[deciding] for chain in before["stages"].values()]
    if not any(_has_begun(output / "stages" / key) for key in keys):
        return ""
    if place >= min(len(old), len(new)):
        return f"it had {_listed(before['labels'])} and has {_listed(now['labels'])}"
    return f"stage {place + 1}, {now['labels'][place]}: {_first(old[place], new[place])}"


def _first(old: Mapping, new: Mapping) -> str:
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key) or (key in old) != (key in new)]
    shown = [f"{key}: {old.get(key, 'not set')} -> {new.get(key, 'not set')}" for key in keys[:3]]
    return ", ".join(shown) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _listed(labels: Sequence[str]) -> str:
    return f"{len(labels)} stages ({', '.join(labels)})"


def _has_begun(run: Path) -> bool:
    return any((run / name).exists() for name in ("metrics.jsonl", "checkpoints", "run.json"))
