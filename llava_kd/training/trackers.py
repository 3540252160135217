"""Where figures go besides `metrics.jsonl`: Weights & Biases and TensorBoard, by their own clients."""

from __future__ import annotations

import functools
import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from llava_kd.durable import make_folder, write_text

WANDB = "wandb_run.json"


class Tracker(Protocol):
    """Where figures go besides `metrics.jsonl`."""

    def log(self, step: int, figures: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class WandbRun:
    """What a run is called there; None is left to wandb and its WANDB_ENTITY, WANDB_RUN_GROUP."""

    project: str
    name: str
    entity: str | None = None
    group: str | None = None
    tags: Sequence[str] = ()
    id: str | None = None


class WandbTracker:
    """Needs the `wandb` package; offline, and without an account, where WANDB_MODE says so.

    The run's id stays in `directory`, so that a run that goes on goes on there too.
    """

    def __init__(self, directory: str | Path, run: WandbRun, *, config: Mapping[str, object]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError("`log.wandb_project` needs wandb: pip install 'llava_kd[wandb]'") from error
        try:
            self._run = wandb.init(
                project=run.project,
                name=run.name,
                entity=run.entity,
                group=run.group,
                tags=list(run.tags) or None,
                config=dict(config),
                id=run.id or _wandb_id(Path(directory), run.project),
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
    make_folder(directory)
    write_text(path, json.dumps({"project": project, "id": drawn}) + "\n")
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
