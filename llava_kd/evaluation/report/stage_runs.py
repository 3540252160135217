"""Runs of stages as they stand on disk, finished or not, for a report of any of them.

RUN/metrics.jsonl, config.yaml, run.json (once finished), eval*/**/summary.json (where it was scored)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llava_kd.evaluation.report.results import (
    Evaluated,
    is_comparison,
    read_metrics,
    read_object,
    read_scores,
)

DEEPEST = 3  # folders below the one that is named, in which runs are looked for


@dataclass(frozen=True, kw_only=True)
class StageRun:
    """`settings` are dotted names and values as text; `record` is what a finished run says of itself."""

    name: str
    directory: Path
    lines: list[dict[str, float]]
    settings: Mapping[str, str]
    record: Mapping[str, Any] | None
    scores: Mapping[str, Evaluated]

    @property
    def state(self) -> str:
        if self.record is not None:
            return "finished"
        return f"at step {self.lines[-1]['step']:,.0f}" if self.lines else "before its first step"

    def last(self, name: str) -> float | None:
        """The last value that was logged of a figure."""
        return next((line[name] for line in reversed(self.lines) if name in line), None)

    def total(self, name: str) -> float:
        return sum(line.get(name, 0.0) for line in self.lines)


def named_runs(named: Sequence[str | Path]) -> list[StageRun] | None:
    """The runs that a report was asked for; None for a comparison, which has a page of its own.

    Raises ValueError where nothing is named, and as `find_runs`.
    """
    if not named:
        raise ValueError("name a run: its output_dir, or a folder that holds runs")
    return None if len(named) == 1 and is_comparison(named[0]) else find_runs(named)


def find_runs(paths: Sequence[str | Path]) -> list[StageRun]:
    """Each path is a run, or holds runs, which follow each other by name.

    Raises ValueError for a path without any, and for a file of a run that cannot be read.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        below = [path] if _is_run(path) else _below(path)
        if not below:
            raise ValueError(
                f"{path} is no run and holds none: a run has metrics.jsonl and config.yaml, which `llava-kd "
                "train` writes into its output_dir"
            )
        found += [run for run in below if run not in found]
    names = _names(found)
    return [_read(path, name) for path, name in zip(found, names, strict=True)]


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file() and (path / "metrics.jsonl").is_file()


def _below(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    patterns = ["/".join(["*"] * depth) for depth in range(1, DEEPEST + 1)]
    return sorted(p for pattern in patterns for p in path.glob(pattern) if p.is_dir() and _is_run(p))


def _names(paths: Sequence[Path]) -> list[str]:
    """As short as tells them apart: the last parts of each path."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _read(path: Path, name: str) -> StageRun:
    try:
        settings = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError(f"{path / 'config.yaml'} must be the settings of a run; got {settings!r:.60}")
        record = path / "run.json"
        return StageRun(
            name=name,
            directory=path,
            lines=read_metrics(path / "metrics.jsonl"),
            settings=dict(_flat(settings)),
            record=read_object(record) if record.is_file() else None,
            scores=read_scores(path),
        )
    except yaml.YAMLError as error:
        words = " ".join(str(error).split())
        raise ValueError(f"{path / 'config.yaml'} must be the settings of a run ({words})") from error


def _flat(tree: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    rows = []
    for key, value in tree.items():
        name = f"{above}{key}"
        rows += _flat(value, f"{name}.") if isinstance(value, Mapping) and value else [(name, str(value))]
    return rows


def differing(runs: Sequence[StageRun]) -> dict[str, list[str]]:
    """Settings that are not alike in all runs, with the value of each; where one has none, a dash."""
    names = sorted({name for run in runs for name in run.settings})
    rows = {name: [run.settings.get(name, "-") for run in runs] for name in names}
    return {name: values for name, values in rows.items() if len(set(values)) > 1}
