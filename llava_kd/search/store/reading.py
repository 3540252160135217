"""A run directory as an entry of the store: finished, failed or broken off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from llava_kd.evaluation.report.results import read_scores
from llava_kd.search.findings.curves import Line, run_record, stage_log
from llava_kd.search.running.schedule import last_line
from llava_kd.search.store.entries import Entry, key_of, settings_of

SCORES = ("slice/", "loss/")
_NO_SCORE = ("slice/seconds", "loss/seconds")


def read_entry(
    directory: Path, tree: Mapping[str, object], *, name: str, data: str | None, failure: str | None = None
) -> Entry:
    """`tree` is its settings with all defaults. One that is not complete has a failure: that, or its own."""
    lines = stage_log(directory)
    record = run_record(directory)
    if failure is None and record is None:
        failure = _unfinished(directory, lines)
    return Entry(
        key=key_of(directory, tree),
        name=name,
        settings=settings_of(tree),
        data=data,
        scores=last_scores(lines) | _tested(directory),
        steps=int(lines[-1].step) if lines else None,
        seconds=lines[-1].seconds if lines else None,
        failure=failure,
    )


def last_scores(lines: Sequence[Line]) -> dict[str, float]:
    """Each figure of questions and of held-out answers, as last asked."""
    found: dict[str, float] = {}
    for line in lines:
        found |= {n: v for n, v in line.figures.items() if n.startswith(SCORES) and n not in _NO_SCORE}
    return found


def _tested(directory: Path) -> dict[str, float]:
    """Accuracies of `llava-kd eval` into folders eval... of the run."""
    return {f"eval/{name}": found.accuracy for name, found in read_scores(directory).items()}


def _unfinished(directory: Path, lines: Sequence[Line]) -> str:
    logs = sorted((directory / "logs").glob("rank*.log"))
    said = last_line(logs[0]) if logs else ""
    where = f"after step {lines[-1].step}" if lines else "before its first step"
    return f"not finished, {where}{f': {said}' if said else ''}"
