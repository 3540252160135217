"""Checkpoints of a run: complete or absent, the newest few kept, safetensors and JSON only."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT_VERSION = 1


def sync_file(path: Path) -> None:
    """Force a written file or directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace `path` in one move: a reader sees the old text or the new, never a part."""
    scratch = path.with_name(f".{path.name}.partial")
    scratch.write_text(text)
    sync_file(scratch)
    scratch.replace(path)


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What a checkpoint holds: whole tensors by name, and how many updates they have seen."""

    step: int
    state: dict[str, Tensor]


class Checkpoints:
    """Directories `step-00000123` under `root`. Only rank 0 writes; every rank may read."""

    def __init__(self, root: str | Path, *, keep: int, extra_files: Mapping[str, str] | None = None) -> None:
        """`extra_files`: text written into every checkpoint, such as the resolved config, by file name."""
        if keep < 1:
            raise ValueError(f"checkpoint.keep must be at least 1; got {keep}")
        self._root = Path(root)
        self._keep = keep
        self._extra_files = dict(extra_files or {})

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        names = (path.name for path in self._root.glob("step-*") if (path / "trainer.json").is_file())
        return sorted(int(name.removeprefix("step-")) for name in names)

    def save(self, saved: Saved) -> Path:
        """Write beside the others, then rename; only after that go older ones, and unreadable newer ones."""
        self._root.mkdir(parents=True, exist_ok=True)
        for leftover in self._root.glob(".step-*"):
            shutil.rmtree(leftover)
        final = self._directory(saved.step)
        scratch = self._root / f".{final.name}.partial"
        scratch.mkdir()
        save_file({name: t.contiguous() for name, t in saved.state.items()}, scratch / "state.safetensors")
        for name, text in self._extra_files.items():
            (scratch / name).write_text(text)
        meta = {"format": FORMAT_VERSION, "step": saved.step}
        (scratch / "trainer.json").write_text(json.dumps(meta))
        for path in (*scratch.iterdir(), scratch):
            sync_file(path)
        if final.exists():
            final.rename(self._root / f".{final.name}.retired")
        scratch.rename(final)
        sync_file(self._root)
        steps = self.steps()
        kept = [step for step in steps if step <= saved.step][-self._keep :]
        for step in set(steps) - set(kept):
            shutil.rmtree(self._directory(step))
        shutil.rmtree(self._root / f".{final.name}.retired", ignore_errors=True)
        return final

    def load_newest(self) -> tuple[Saved | None, list[str]]:
        """The newest readable checkpoint, and a line for each newer one that could not be read.

        Raises ValueError for one that a newer version wrote: it is sound, and must not be passed over.
        """
        problems: list[str] = []
        for step in reversed(self.steps()):
            directory = self._directory(step)
            try:
                meta = json.loads((directory / "trainer.json").read_text())
                version, saved_step = int(meta["format"]), int(meta["step"])
                state = load_file(directory / "state.safetensors") if version <= FORMAT_VERSION else {}
            except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
                problems.append(f"{directory} cannot be read and is passed over: {error}")
                continue
            if version > FORMAT_VERSION:
                raise ValueError(
                    f"{directory} has format {version}, this version reads up to {FORMAT_VERSION}; upgrade "
                    "llava_kd, or remove that checkpoint"
                )
            return Saved(step=saved_step, state=state), problems
        return None, problems

    def _directory(self, step: int) -> Path:
        return self._root / f"step-{step:08d}"
