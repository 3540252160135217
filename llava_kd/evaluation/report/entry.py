"""A report of whatever directories are named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from llava_kd.evaluation.report.page import report
from llava_kd.evaluation.report.results import read_run, table
from llava_kd.evaluation.report.runs_page import write_runs_page
from llava_kd.evaluation.report.stage_runs import named_runs


def report_on(
    named: Sequence[str | Path], *, terms: Mapping[str, str], out: str | Path | None = None
) -> tuple[Path, str]:
    """The page, and what a terminal shows: a comparison (see `results`) by its own page, others as runs.

    `out` None is report.html in the first directory. Raises ValueError where nothing is named, or no run.
    """
    runs = named_runs(named)
    first = Path(named[0])
    if runs is not None:
        written = write_runs_page(runs, out or first / "report.html", terms)
        return written, "\n".join(f"{run.name}: {run.state}" for run in runs)
    if out is not None:
        raise ValueError(
            f"{first} is a comparison: its page is always report.html there; do not give another path"
        )
    return report(first, terms=terms), table(read_run(first))
