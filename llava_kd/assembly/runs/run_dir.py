"""The directory of a run: made, re-entered by the same run alone, and refused to any other."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import yaml

from llava_kd.assembly.runs.provenance import read_run
from llava_kd.assembly.settings import load, tables_of
from llava_kd.config import TrainConfig, dump
from llava_kd.durable import make_folder, write_text
from llava_kd.parallel.world import World
from llava_kd.training.checkpoint import checkpoint_steps, refuse_newer_format, sweep

# What may change when a run goes on: where and how it is computed, not what.
MAY_CHANGE = (
    "output_dir",
    "log.",
    "profile",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.best",
    "evaluate",
    "pictures.hard.show_every",
    "on_policy.batch_size",
    *(
        f"on_policy.server.{key}"
        for key in ("url", "model", "key_env", "weights", "jobs", "timeout", "retries")
    ),
    "micro_batch_size",
    "engine.kind",
    "engine.zero_stage",
    "engine.device",
    "engine.activation_checkpointing",
    "engine.timeout_minutes",
    "teacher.placement",
    "teacher.cache",  # where it is; what it holds is part of the checkpoints' identity
    "data.num_workers",
    "data.follow_symlinks",
    "data.image_cache_mb",
    "data.max_bad_rate",
)
PLUGINS = "plugins.json"  # what they were when the run began
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


def check_world(config: TrainConfig, world: World) -> None:
    """ValueError if this number of ranks cannot run these settings. Needs no model."""
    if config.global_batch_size % world.size:
        near = [n for n in range(1, config.global_batch_size + 1) if config.global_batch_size % n == 0]
        below = max(n for n in near if n <= world.size)
        raise ValueError(
            f"global_batch_size ({config.global_batch_size}) must be a multiple of the number of ranks; "
            f"got {world.size} ranks: start {below} ranks, or set global_batch_size to "
            f"{-(-config.global_batch_size // world.size) * world.size}"
        )
    if config.engine.kind == "single" and world.size > 1:
        raise ValueError(
            f"engine.kind is single, but {world.size} ranks run; use auto, ddp, fsdp2 or deepspeed"
        )
    if config.engine.kind in ("ddp", "fsdp2", "deepspeed") and world.size == 1:
        raise ValueError(
            f"engine.kind is {config.engine.kind}, which needs several ranks, but one runs; use auto, or "
            "start more ranks (NPROC)"
        )


@contextmanager
def claim(config: TrainConfig, world: World) -> Iterator[bool]:
    """Hold the output directory during the block; True if its run is complete.

    Raises ValueError if it cannot be written, another process holds it, it holds another run, or its
    checkpoints come from a newer version.
    """
    output = Path(config.output_dir)
    with ExitStack() as held:
        if _is_read_only(output) and _is_complete(output, config):
            _check_config(config, output)
            yield True
            return
        with world.together():
            if world.is_main:
                held.enter_context(locked(output))
        with world.together():
            _check_config(config, output)
            refuse_newer_format(output / "checkpoints")
        with world.together():
            if world.is_main:
                sweep(output)
                sweep(output / "checkpoints")
                write_text(output / "config.yaml", dump(config))
                if config.plugins:
                    write_text(output / PLUGINS, json.dumps(tables_of(config).fingerprints, indent=1))
                if not _is_complete(output, config):
                    _reopen(output)
        yield _is_complete(output, config)


def _is_complete(output: Path, config: TrainConfig) -> bool:
    """Whether the run has been finished, and was to be no longer than it is."""
    path = output / "run.json"
    return path.is_file() and not _longer(_finished(path), config)


def _finished(path: Path) -> dict[str, object]:
    """The settings that a run was finished with."""
    return yaml.safe_load(read_run(path)["config"])


def _longer(before: Mapping[str, object], config: TrainConfig) -> bool:
    """Whether `config` has more steps, or more epochs, than the same run had before."""
    old, new = ((t.get("max_steps"), t.get("epochs")) for t in (before, dataclasses.asdict(config)))
    if old[0] is None and new[0] is None:
        old, new = old[1:], new[1:]
    numbers = old[0], new[0]
    return all(isinstance(n, int | float) for n in numbers) and numbers[0] < numbers[1]  # type: ignore[operator]


def _reopen(output: Path) -> None:
    """Let a finished run that is to be longer go on from its last checkpoint; keep what it said of itself."""
    path = output / "run.json"
    if not path.is_file():
        return
    steps = read_run(path)["steps"]
    if steps not in checkpoint_steps(output / "checkpoints"):
        raise ValueError(
            f"{output} was finished at step {steps}, but the checkpoint of that step is missing, so it "
            "cannot be extended; start a new stage in another output_dir with "
            f"student.checkpoint={output / 'model'}"
        )
    # On disk with the next save, which makes its folder first: before any checkpoint makes way.
    path.rename(output / f"run-step-{steps:08d}.json")
    print(
        f"{output} was finished at step {steps} and is extended: from there on it follows the schedule of "
        "the longer run",
        file=sys.stderr,
        flush=True,
    )


def _is_read_only(output: Path) -> bool:
    """Whether nothing can be written there: a finished run may have been put away so."""
    return output.is_dir() and not os.access(output, os.W_OK)


def refuse_other_run(config: TrainConfig) -> None:
    """ValueError for an output directory that `claim` would refuse, without touching it."""
    output = Path(config.output_dir)
    if output.is_dir():
        _check_config(config, output)
        refuse_newer_format(output / "checkpoints")


@contextmanager
def locked(output: Path, name: str = "output_dir") -> Iterator[None]:
    """Make the directory and keep other runs out of it; the system lets go of it when the process ends."""
    try:
        make_folder(output)
        stream = (output / ".lock").open("w")
    except OSError as error:
        raise ValueError(
            f"{name} {output} cannot be written ({error}); name a directory that you can write to"
        ) from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process is running in {output}; wait for it, or choose a new {name}"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS_HERE:
                raise
        yield


def _check_plugins(config: TrainConfig, output: Path) -> None:
    """ValueError naming a plug-in that is not what it was when the run began."""
    path = output / PLUGINS
    try:
        before = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}); remove it to continue with the current plug-ins"
        ) from error
    for name, now in tables_of(config).fingerprints.items():
        if (then := before.get(name)) not in (None, now):
            raise ValueError(
                f"{name} changed since the run in {output} started: sha256 {then[:16]} then, {now[:16]} "
                "now; restore the old file, or choose a new output_dir"
            )


def _check_config(config: TrainConfig, output: Path) -> None:
    written = output / "config.yaml"
    # A run that stopped before its first step, over a mistake in its settings or data, does not count.
    has_begun = any((output / name).exists() for name in ("metrics.jsonl", "checkpoints", "run.json"))
    if written.is_file() and not has_begun:
        return
    if written.is_file():
        _check_plugins(config, output)
        before = load(written)
        is_longer = (output / "run.json").is_file() and _longer(dataclasses.asdict(before), config)
        may_change = (*MAY_CHANGE, "max_steps", "epochs") if is_longer else MAY_CHANGE
        if changes := differences(before, config, may_change=may_change):
            raise ValueError(
                f"{output} already contains another run: {'; '.join(changes)}; restore those settings, "
                "choose a new output_dir or remove it"
            )
    elif any(not path.name.startswith(".") for path in output.iterdir()):
        raise ValueError(f"{output} is not empty and contains no run; choose a new output_dir")


def differences(
    before: TrainConfig, after: TrainConfig, *, may_change: tuple[str, ...] = MAY_CHANGE
) -> list[str]:
    """Settings that decide the result and are not the same, as `key: before -> after`."""
    old, new = _flat(dataclasses.asdict(before)), _flat(dataclasses.asdict(after))
    keys = [key for key in {**old, **new} if not key.startswith(may_change)]
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys if old.get(key) != new.get(key)]


def _flat(tree: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
