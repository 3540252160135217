"""What the files of a run say, also of one that is being written or was cut off."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

METRICS = "metrics.jsonl"
LINES_OF_TAIL = 3
STALE_AFTER = 5  # times the usual time between two lines, and a minute at least


@dataclass(frozen=True, kw_only=True)
class Seen:
    """`lines` are those of the metrics in order, without such as are torn; `said` the last of the log."""

    directory: Path
    lines: tuple[Mapping[str, float], ...]
    said: tuple[str, ...]
    is_complete: bool
    now: float

    @property
    def last(self) -> Mapping[str, float]:
        return self.lines[-1] if self.lines else {}

    @property
    def state(self) -> str:
        """`complete`, `running`, `starting`, or that nothing came for how long."""
        if self.is_complete:
            return "complete"
        if not self.lines:
            return "starting: no metrics yet"
        if "time" not in self.last:
            return "not complete"
        since, gap = self.now - self.last["time"], self._gap()
        return "running" if since < max(60.0, STALE_AFTER * gap) else f"no new metrics for {duration(since)}"

    @property
    def seconds_left(self) -> float | None:
        left = self.last.get("seconds_left")
        return None if left is None or self.is_complete else max(0.0, left - (self.now - self.last["time"]))

    def curve(self, name: str) -> list[float]:
        return [line[name] for line in self.lines if name in line]

    @property
    def losses(self) -> list[str]:
        """The loss, its terms, and what held-out answers cost."""
        seen = dict.fromkeys(name for line in self.lines for name in line)
        terms = [name.removeprefix("gradient/") for name in seen if name.startswith("gradient/")]
        held = [name for name in seen if re.fullmatch(r"(loss|slice)/[^/]+", name) and "/seconds" not in name]
        named: dict[str, None] = dict.fromkeys(["loss", *(terms if len(terms) > 1 else []), *held])
        return [name for name in named if name in seen]

    def _gap(self) -> float:
        times = [line["time"] for line in self.lines[-5:] if "time" in line]
        return (times[-1] - times[0]) / max(1, len(times) - 1) if times else 0.0


def look(directory: Path, now: float | None = None) -> Seen:
    """Raises ValueError for a directory that is no run and holds none."""
    run = _run_in(directory)
    return Seen(
        directory=run,
        lines=tuple(_metrics(run / METRICS)),
        said=tuple(_tail(run / "logs" / "rank00000.log")),
        is_complete=(run / "run.json").is_file(),
        now=time.time() if now is None else now,
    )


def _run_in(directory: Path) -> Path:
    """The directory itself if it is a run's, or the one below it that wrote last."""
    if not directory.is_dir():
        raise ValueError(f"no run {directory}; give the output_dir of a run, or a folder of runs")
    if (directory / "config.yaml").is_file():
        return directory
    runs = [path.parent for path in directory.glob("**/config.yaml") if "checkpoints" not in path.parts]
    if not runs:
        raise ValueError(
            f"{directory} contains no run (no config.yaml); give the output_dir of a run, or a folder of runs"
        )
    return max(runs, key=_written)


def _written(run: Path) -> float:
    files = (run / METRICS, run / "config.yaml")
    return max((path.stat().st_mtime for path in files if path.is_file()), default=0.0)


def _metrics(path: Path) -> list[dict[str, float]]:
    """Its lines by step; one that is torn, or no object of numbers, is passed over."""
    try:
        data = path.read_bytes()
    except OSError:
        return []
    found: dict[float, dict[str, float]] = {}
    for line in data.splitlines():
        try:
            tree = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(tree, dict) and isinstance(tree.get("step"), int):
            numbers = {
                k: float(v) for k, v in tree.items() if isinstance(v, int | float) and math.isfinite(v)
            }
            found[numbers["step"]] = numbers
    return [found[step] for step in sorted(found)]


def _tail(path: Path) -> list[str]:
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - 8192))
            lines = stream.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return [line.partition(": ")[2] or line for line in lines[-LINES_OF_TAIL:]]


def duration(seconds: float) -> str:
    """In words, coarser the longer it is."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
