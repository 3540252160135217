"""What a run reports: a JSON line every few steps, a line of progress, and optional trackers."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from llava_kd.durable import Lines, write_text
from llava_kd.training.progress import Progress
from llava_kd.training.trackers import Tracker


class Metrics:
    """Means over the steps since the last line; tensors stay on the device until a line is written."""

    def __init__(
        self,
        directory: str | Path,
        *,
        num_steps: int,
        every: int = 10,
        trackers: Sequence[Tracker] = (),
        progress: Progress | None = None,
        terms: Sequence[str] = (),
        steps_per_epoch: int | None = None,
    ) -> None:
        """`terms` are those of the figures whose losses the line of progress shows."""
        self._path = Path(directory) / "metrics.jsonl"
        self._every = max(1, every)
        self._num_steps = num_steps
        self._trackers = trackers
        self._progress = progress or Progress(num_steps, "train", is_shown=False)
        self._terms = terms
        self._steps_per_epoch = steps_per_epoch
        self._lines = Lines(self._path)
        self._pending: list[dict[str, Tensor]] = []
        self._amounts = {"tokens": 0.0, "samples": 0.0}
        self._since = time.monotonic()

    def resume(self, step: int) -> None:
        """Drop lines of steps that are about to be done again, and show `step` as done."""
        if self._path.exists():
            text = self._path.read_text(encoding="utf-8", errors="replace")  # a power cut may damage the end
            kept = [line for line in text.splitlines() if _step_of(line) <= step]
            write_text(self._path, "".join(f"{line}\n" for line in kept))  # a kill leaves all or these
        self._progress.resume(step)
        self._since = time.monotonic()

    def add(
        self,
        step: int,
        figures: Mapping[str, Tensor],
        amounts: Mapping[str, Tensor],
        telemetry: Callable[[], Mapping[str, float]],
        measured: Mapping[str, float] | None = None,
    ) -> None:
        """`figures` are averaged, `amounts` become rates per second, `telemetry` is read once a line.

        `measured` is what is had at a few steps alone, as by an evaluation after this one; the line is then
        written at once. `step` counts updates from 1.
        """
        self._pending.append({**figures, **{f"amount/{name}": value for name, value in amounts.items()}})
        self._progress.step()
        if step % self._every == 0 or step == self._num_steps or measured:
            self._write(step, {**telemetry(), **(measured or {})})

    def sync(self) -> None:
        """Force the lines so far to disk: a checkpoint that a power cut leaves has those of its steps."""
        self._lines.sync()

    def pause(self, seconds: float) -> None:
        """Leave `seconds` that were not spent on updates out of the rates."""
        self._since += seconds

    def _write(self, step: int, telemetry: Mapping[str, float]) -> None:
        means = {name: _mean([p[name] for p in self._pending if name in p]) for name in self._pending[-1]}
        seconds = max(time.monotonic() - self._since, 1e-9)
        count = len(self._pending)
        line = {"step": step, **{n: v for n, v in means.items() if not n.startswith("amount/")}, **telemetry}
        for name, value in means.items():
            if name.startswith("amount/"):
                line[f"{name.removeprefix('amount/')}_per_s"] = value * count / seconds
        line |= self._timed(step, seconds / count)
        if "data_wait_s" in telemetry:
            line["data_wait_share"] = telemetry["data_wait_s"] / seconds
        if "images" in telemetry:
            line["images_per_s"] = telemetry["images"] / seconds
        if telemetry.get("token_places"):
            line["fill"] = telemetry["tokens"] / telemetry["token_places"]
        line |= _utilisation(telemetry, seconds)
        self._lines.write(json.dumps(line) + "\n")
        for tracker in self._trackers:
            tracker.log(step, {name: value for name, value in line.items() if name != "step"})
        self._progress.report(line, self._terms)
        self._pending.clear()
        self._since = time.monotonic()

    def _timed(self, step: int, seconds_per_step: float) -> dict[str, float]:
        self._progress.timed(seconds_per_step)
        timed = {"seconds_per_step": seconds_per_step, "time": time.time(), "num_steps": self._num_steps}
        if (left := self._progress.seconds_left) is not None:
            timed["seconds_left"] = left
        if self._steps_per_epoch:
            timed["epoch"] = step / self._steps_per_epoch
        return timed

    def close(self) -> None:
        self._progress.close()
        self._lines.close()
        for tracker in self._trackers:
            tracker.close()


def _utilisation(telemetry: Mapping[str, float], seconds: float) -> dict[str, float]:
    """Operations a second of this rank, by whose they are, and what share of the device's peak they are."""
    rates = {name: value / seconds for name, value in telemetry.items() if name.endswith("_tflop")}
    found = {f"{name}_per_s": rate for name, rate in rates.items()}
    if peak := telemetry.get("peak_tflops"):
        found |= {f"{name.removesuffix('_tflop')}_mfu": rate / peak for name, rate in rates.items()}
    return found


def peak_memory(device: torch.device) -> int:
    """Most bytes so far: that PyTorch held on a GPU; on the CPU, of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _step_of(line: str) -> float:
    """Step of a metrics line; infinity for a line that was cut off, so that it is dropped."""
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        return math.inf


def _mean(values: Sequence[Tensor]) -> float:
    return torch.stack([value.double() for value in values]).mean().item()
