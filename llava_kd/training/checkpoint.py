"""Checkpoints of a run: complete or absent, the newest few kept, safetensors and JSON only."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from llava_kd.checksums import checksum, meta_checksum, sealed
from llava_kd.durable import delete, make_folder, put_folder, sync
from llava_kd.tensor_files import write_tensors

FORMAT_VERSION = 1
_UNSEALED = {"format", "step", "crc32", "figures", "identity"}  # what versions without a checksum wrote


def sweep(directory: Path) -> None:
    """Remove what a killed process left half-written, or half-removed, in `directory`."""
    for pattern in (".*.partial", ".*.retired"):
        for leftover in directory.glob(pattern):
            delete(leftover)


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What a checkpoint holds: whole tensors by name, and how many updates they have seen.

    `figures` are what an evaluation at that step gave, empty where there was none.
    """

    step: int
    state: dict[str, Tensor]
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Best:
    """The checkpoint where a figure is best, the first of equal ones."""

    step: int
    figure: str
    value: float

    @property
    def order(self) -> tuple[float, int]:
        """Lower is better: a loss is best where it is lowest, any other figure where it is highest."""
        return (self.value if self.figure.startswith("loss/") else -self.value), self.step


class Checkpoints:
    """Directories `step-00000123` under `root`. Only rank 0 writes; every rank may read."""

    def __init__(
        self,
        root: str | Path,
        *,
        keep: int,
        best: str | None = None,
        extra_files: Mapping[str, str] | None = None,
        identity: Mapping[str, str] | None = None,
    ) -> None:
        """`best`: a figure of evaluations; the checkpoint where it is best is kept besides the newest.

        `extra_files`: text written into every checkpoint, such as the resolved config, by file name.

        `identity`: fingerprints, by what they are of, of all that a checkpoint relies on but does not hold,
        such as frozen weights and data. A checkpoint with another identity is refused.
        """
        if keep < 1:
            raise ValueError(f"checkpoint.keep must be at least 1; got {keep}")
        self._root = Path(root)
        self._keep = keep
        self._figure_name = best
        self._extra_files = dict(extra_files or {})
        self.identity = dict(identity or {})

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return checkpoint_steps(self._root)

    @property
    def figure(self) -> str | None:
        """The figure whose best checkpoint is kept."""
        return self._figure_name

    def best(self, *, up_to: int | None = None) -> Best | None:
        """Where the figure is best among the complete checkpoints `up_to` a step; None without any."""
        ranking = self._ranking(up_to)
        return ranking[0] if ranking else None

    def load_best(self) -> tuple[Saved | None, list[str]]:
        """The best readable checkpoint, and a line for each better one that could not be read."""
        return self._first_readable([best.step for best in self._ranking(None)])

    def _ranking(self, up_to: int | None) -> list[Best]:
        found = []
        for step in self.steps() if self._figure_name is not None else ():
            if up_to is not None and step > up_to:
                continue
            try:
                figures = read_meta(self._directory(step)).get("figures")
            except (_UnreadableError, OSError):
                continue
            value = figures.get(self._figure_name) if isinstance(figures, dict) else None
            if isinstance(value, int | float):
                assert self._figure_name is not None
                found.append(Best(step=step, figure=self._figure_name, value=float(value)))
        return sorted(found, key=lambda best: best.order)

    def save(self, saved: Saved) -> Path:
        """Write beside the others, then rename; only after that go older ones, and unreadable newer ones.

        Raises ValueError if it cannot be written, as on a full disk: those before it are as they were.
        """
        final = self._directory(saved.step)
        scratch = self._root / f".{final.name}.partial"
        try:
            make_folder(self._root)
            sweep(self._root)
            scratch.mkdir()
            self._write(scratch, saved)
            put_folder(scratch, final)
        except OSError as error:
            shutil.rmtree(scratch, ignore_errors=True)
            raise ValueError(
                f"the checkpoint of step {saved.step} cannot be written into {self._root}: {error}; those "
                f"before it are whole ({self.steps()}). Free some space; the same command then goes on"
            ) from error
        for step in self.steps():
            if step > saved.step:
                self._remove(self._directory(step))
        self.drop_older(saved.step)
        return final

    def drop_older(self, newest: int) -> None:
        """Remove what a save of step `newest` would have removed of older ones, had it not been killed."""
        steps = [step for step in self.steps() if step <= newest]
        best = self.best(up_to=newest)
        for step in set(steps[: -self._keep]) - {None if best is None else best.step}:
            self._remove(self._directory(step))

    def load_newest(self) -> tuple[Saved | None, list[str]]:
        """The newest readable checkpoint, and a line for each newer one that could not be read.

        Raises ValueError if it was written by a newer version, or relies on other frozen weights or data.
        """
        return self._first_readable(list(reversed(self.steps())))

    def _first_readable(self, steps: Sequence[int]) -> tuple[Saved | None, list[str]]:
        problems: list[str] = []
        for step in steps:
            directory = self._directory(step)
            try:
                saved = _read(directory)
            except (SafetensorError, OSError, _UnreadableError) as error:
                problems.append(f"{directory} cannot be read and is skipped: {error}")
                continue
            meta = read_meta(directory)
            self._check_identity(directory, meta)
            if "checksum" not in meta:
                problems.append(
                    f"{directory} is of a version without a checksum of trainer.json, so it is not checked"
                )
            return saved, problems
        return None, problems

    def _write(self, scratch: Path, saved: Saved) -> None:
        path = scratch / "state.safetensors"
        write_tensors(saved.state, path)
        for name, text in self._extra_files.items():
            (scratch / name).write_text(text)
        meta = {
            "format": FORMAT_VERSION,
            "step": saved.step,
            "crc32": checksum(path),
            "figures": dict(saved.figures),
            "identity": self.identity,
        }
        (scratch / "trainer.json").write_text(json.dumps(sealed(meta), indent=2))

    def _remove(self, directory: Path) -> None:
        """Rename first, so that a directory of that name is always whole."""
        retired = directory.with_name(f".{directory.name}.retired")
        directory.rename(retired)
        sync(self._root)  # else a power cut may leave the name with a part of the files
        delete(retired)

    def _check_identity(self, directory: Path, meta: Mapping[str, object]) -> None:
        before = meta.get("identity")
        assert isinstance(before, dict)  # read_meta has looked
        for what in sorted({*before, *self.identity}):
            then, now = before.get(what), self.identity.get(what)
            if then == now:
                continue
            changed = f"with another {what}: fingerprint {then}, now {now}"
            if then is None or now is None:
                one, other = ("without", "with") if then is None else ("with", "without")
                changed = f"{one} a {what}, and this run is {other}"
            raise ValueError(
                f"{directory} was trained {changed}. Restore what it was, or start in a new output_dir"
            )

    def _directory(self, step: int) -> Path:
        return self._root / f"step-{step:08d}"


class _UnreadableError(Exception):
    """A checkpoint is damaged: an older one may serve."""


def checkpoint_steps(root: Path) -> list[int]:
    """Steps of the complete checkpoints under `root`, oldest first."""
    found = (path for path in root.glob("step-*") if (path / "trainer.json").is_file())
    matches = (re.fullmatch(r"step-(\d{8,})", path.name) for path in found)  # no step-00000004.bak
    return sorted(int(match.group(1)) for match in matches if match)


def refuse_newer_format(root: Path) -> None:
    """ValueError if a checkpoint under `root` was written by a newer version. Reads no tensor."""
    for step in checkpoint_steps(root):
        try:
            read_meta(root / f"step-{step:08d}")
        except (_UnreadableError, OSError):
            continue  # passed over, and named, when it is loaded


def read_meta(directory: Path) -> dict[str, object]:
    """`trainer.json`. Raises ValueError if a newer version wrote it."""
    try:
        meta = json.loads((directory / "trainer.json").read_text())
    except ValueError as error:
        raise _UnreadableError(f"trainer.json is not JSON ({error})") from error
    if not isinstance(meta, dict) or not isinstance(meta.get("format"), int):
        raise _UnreadableError("trainer.json has no format number")
    if "checksum" in meta:
        if meta["checksum"] != meta_checksum(meta):
            raise _UnreadableError("trainer.json has another checksum than when it was written")
    elif meta["format"] <= FORMAT_VERSION and (unknown := set(meta) - _UNSEALED):
        raise _UnreadableError(f"trainer.json has no checksum, but {sorted(unknown)}")
    if meta["format"] > FORMAT_VERSION:
        raise ValueError(
            f"{directory} has format {meta['format']}, this version reads up to {FORMAT_VERSION}; upgrade "
            "llava_kd, or start in a new output_dir"
        )
    kinds = {"step": int, "crc32": int, "identity": dict}
    if missing := [name for name, kind in kinds.items() if not isinstance(meta.get(name), kind)]:
        raise _UnreadableError(f"trainer.json has no {missing[0]}")
    return meta


def _read(directory: Path) -> Saved:
    meta = read_meta(directory)
    step, figures = meta["step"], meta.get("figures", {})
    assert isinstance(step, int)  # read_meta has looked
    if directory.name != f"step-{step:08d}":
        raise _UnreadableError(f"it holds the checkpoint of step {step}: a copy of that one, or a link to it")
    if not isinstance(figures, dict):
        raise _UnreadableError("trainer.json has figures that are no table")
    return Saved(step=step, state=_read_state(directory, meta), figures=figures)


def _read_state(directory: Path, meta: Mapping[str, object]) -> dict[str, Tensor]:
    path = directory / "state.safetensors"
    if (found := checksum(path)) != meta["crc32"]:
        raise _UnreadableError(
            f"{path.name} has checksum {found}, not {meta['crc32']} as when it was written"
        )
    return load_file(path)
