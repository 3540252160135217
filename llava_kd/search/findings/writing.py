"""The three files of results."""

from __future__ import annotations

import json
from collections.abc import Mapping

from llava_kd.durable import write_text
from llava_kd.search.findings.curves import chain_curve
from llava_kd.search.findings.grid_page import page
from llava_kd.search.findings.grid_results import RESULTS, collect
from llava_kd.search.findings.grid_tables import markdown
from llava_kd.search.grids.grid import Grid
from llava_kd.search.grids.sharing import Plan


def write_results(grid: Grid, plan: Plan, broken: Mapping[str, str]) -> None:
    """results.json, results.md and results.html of all that is finished; `broken` as of `collect`."""
    results = collect(grid, plan, broken)
    curves = {
        arm: [
            chain_curve([plan.stages[key].directory for key in run.chain], grid.curve)
            for run in plan.of(arm)
            if run.seed in results["arms"][arm]["seeds"]
        ]
        for arm in grid.arms
    }
    write_text(grid.output / RESULTS, json.dumps(results, indent=1) + "\n")
    write_text(grid.output / "results.md", markdown(results))
    write_text(grid.output / "results.html", page(results, curves))
