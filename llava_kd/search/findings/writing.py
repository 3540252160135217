"""The three files of results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from llava_kd.durable import write_text
from llava_kd.search.findings.grid_page import page
from llava_kd.search.findings.grid_results import RESULTS, all_scored, collect
from llava_kd.search.findings.grid_tables import markdown
from llava_kd.search.findings.scored import Scored
from llava_kd.search.grids.grid import Grid
from llava_kd.search.grids.sharing import Plan


def write_results(grid: Grid, plan: Plan, elsewhere: Sequence[Scored], broken: Mapping[str, str]) -> None:
    """results.json, results.md and results.html of all that is finished, here or `elsewhere`.

    `broken`: the faults of `collect`.
    """
    scored = all_scored(grid, plan, elsewhere)
    results = collect(grid, plan, scored, broken)
    curves = {arm: [one.curve for one in own] for arm, own in scored.items()}
    write_text(grid.output / RESULTS, json.dumps(results, indent=1) + "\n")
    write_text(grid.output / "results.md", markdown(results))
    write_text(grid.output / "results.html", page(results, curves))
