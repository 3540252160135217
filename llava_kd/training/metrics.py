"""What a run reports: a JSON line every few steps, a progress bar, and optional trackers."""

from __future__ import annotations

import functools
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TextIO

import torch
from torch import Tensor
from tqdm import tqdm

from llava_kd.training.checkpoint import write_text

WANDB = "wandb_run.json"


class Tracker(Protocol):
    """Where figures go besides `metrics.jsonl`."""

    def log(self, step: int, figures: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class WandbTracker:
    """Needs the `wandb` package; offline, and without an account, where WANDB_MODE says so.

    The run's id stays in `directory`, so that a run that goes on goes on there too.
    """

    def __init__(
        self, directory: str | Path, *, project: str, name: str, config: Mapping[str, object]
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError("`log.wandb_project` needs wandb: pip install 'llava_kd[wandb]'") from error
        try:
            self._run = wandb.init(
                project=project,
                name=name,
                config=dict(config),
                id=_wandb_id(Path(directory), project),
                resume="allow",
            )
        except wandb.Error as error:
            raise ValueError(
                f"`log.wandb_project`: wandb does not start: {' '.join(str(error).split())} "
                "WANDB_MODE=offline needs no account"
            ) from error

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


def _wandb_id(directory: Path, project: str) -> str:
    """WANDB_RUN_ID, or what an earlier call drew for this directory and project, or a new one."""
    if given := os.environ.get("WANDB_RUN_ID"):
        return given
    path = directory / WANDB
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["project"] == project:
                return str(found["id"])
        except (ValueError, KeyError, TypeError):
            pass  # cut off by a full disk, say: a new run is begun
    drawn = uuid.uuid4().hex[:12]
    directory.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.partial")
    scratch.write_text(json.dumps({"project": project, "id": drawn}) + "\n", encoding="utf-8")
    scratch.replace(path)
    return drawn


class TensorBoardTracker:
    """Needs the `tensorboard` package. What an earlier call logged of the same steps is left out."""

    def __init__(self, directory: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "`log.tensorboard` needs tensorboard: pip install 'llava_kd[tensorboard]'"
            ) from error
        self._open: Callable[..., SummaryWriter] = functools.partial(SummaryWriter, str(directory))
        self._writer: SummaryWriter | None = None

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        if self._writer is None:
            self._writer = self._open(purge_step=step)
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class Metrics:
    """Means over the steps since the last line; tensors stay on the device until a line is written."""

    def __init__(
        self,
        directory: str | Path,
        *,
        num_steps: int,
        every: int = 10,
        trackers: Sequence[Tracker] = (),
        progress: bool = True,
        title: str = "train",
        line: int = 0,
    ) -> None:
        """`line` keeps the bars of runs that share a terminal apart."""
        self._path = Path(directory) / "metrics.jsonl"
        self._every = max(1, every)
        self._num_steps = num_steps
        self._trackers = trackers
        self._bar = tqdm(
            total=num_steps, desc=title, unit="step", disable=not progress, mininterval=1.0, position=line
        )
        self._file: TextIO | None = None
        self._pending: list[dict[str, Tensor]] = []
        self._amounts = {"tokens": 0.0, "samples": 0.0}
        self._since = time.monotonic()

    def resume(self, step: int) -> None:
        """Drop lines of steps that are about to be done again, and put the bar at `step`."""
        if self._path.exists():
            kept = [line for line in self._path.read_text().splitlines() if _step_of(line) <= step]
            write_text(self._path, "".join(f"{line}\n" for line in kept))  # a kill leaves all or these
        self._bar.n = step
        self._bar.refresh()
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
        self._bar.update()
        if step % self._every == 0 or step == self._num_steps or measured:
            self._write(step, {**telemetry(), **(measured or {})})

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
        line["seconds_per_step"] = seconds / count
        if "data_wait_s" in telemetry:
            line["data_wait_share"] = telemetry["data_wait_s"] / seconds
        if "images" in telemetry:
            line["images_per_s"] = telemetry["images"] / seconds
        if telemetry.get("token_places"):
            line["fill"] = telemetry["tokens"] / telemetry["token_places"]
        if self._file is None:
            self._file = self._path.open("a")
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.log(step, {name: value for name, value in line.items() if name != "step"})
        shown = {name: f"{line[name]:.3g}" for name in ("loss", "lr") if name in line}
        self._bar.set_postfix(shown, refresh=False)
        self._pending.clear()
        self._since = time.monotonic()

    def close(self) -> None:
        self._bar.close()
        if self._file is not None:
            self._file.close()
        for tracker in self._trackers:
            tracker.close()


def _step_of(line: str) -> float:
    """Step of a metrics line; infinity for a line that was cut off, so that it is dropped."""
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        return math.inf


def _mean(values: Sequence[Tensor]) -> float:
    return torch.stack([value.double() for value in values]).mean().item()
