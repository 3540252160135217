"""Results files of this grid from other machines, kept under OUT/elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from llava_kd.durable import make_folder, write_whole
from llava_kd.search.findings.grid_results import file_print, read_results
from llava_kd.search.findings.scored import Scored, from_json
from llava_kd.search.grids.grid import Grid
from llava_kd.search.grids.models import model_prints
from llava_kd.search.grids.sharing import Plan

FOLDER = "elsewhere"


def kept_files(grid: Grid) -> list[Path]:
    return sorted((grid.output / FOLDER).glob("*.json"))


def keep_files(grid: Grid, files: Sequence[Path]) -> None:
    """Copy them under names by their content, so that later calls read them too."""
    for path in files:
        content = path.read_bytes()
        make_folder(grid.output / FOLDER)
        write_whole(grid.output / FOLDER / f"{hashlib.sha256(content).hexdigest()[:16]}.json", [content])


def read_elsewhere(grid: Grid, plan: Plan, files: Sequence[Path]) -> list[Scored]:
    """What `files` hold of the arms and seeds of this grid, each once.

    ValueError names a file of another grid, other settings, models or tests, or one without single runs.
    """
    found: dict[tuple[str, int], Scored] = {}
    for path in files:
        for scored in _read(grid, plan, path):
            found.setdefault((scored.arm, scored.seed), scored)
    return list(found.values())


def _read(grid: Grid, plan: Plan, path: Path) -> list[Scored]:
    if not path.is_file():
        raise ValueError(f"there is no results file {path}; give the results.json of the other machine")
    results = read_results(path)
    try:
        name, models = str(results["name"]), dict(results["models"])
        tests = {str(key): test["sha256"] for key, test in results["tests"].items()}
        scored = [from_json(record) for record in results["finished"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} does not hold its single runs ({error!r}): an older version wrote it. Run the same "
            "command there with this version: it writes the file again without training"
        ) from error
    if name != grid.name:
        raise ValueError(f"{path} holds results of the ablation {name}, not of {grid.name}")
    here = model_prints(plan)
    if changed := [model for model, prints in models.items() if here.get(model, prints) != prints]:
        raise ValueError(f"{path} was made from other files of the model {changed[0]} than those here")
    if set(tests) != set(grid.tests):
        raise ValueError(f"{path} has the tests {', '.join(tests)}; {grid.path} has {', '.join(grid.tests)}")
    for test in grid.tests.values():
        if None not in (tests[test.name], own := file_print(test.data)) and tests[test.name] != own:
            raise ValueError(
                f"{path} was scored on another {test.data} than the one here: their hashes differ"
            )
    chains = {(run.arm, run.seed): run.chain for run in plan.runs}
    wanted = [one for one in scored if (one.arm, one.seed) in chains]
    for one in wanted:
        if one.chain != chains[one.arm, one.seed]:
            raise ValueError(
                f"{path}: arm {one.arm}, seed {one.seed} was trained with other settings than {grid.path} "
                "has; give the results of this file"
            )
    return wanted
