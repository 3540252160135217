"""The directory of a run: made, re-entered by the same run alone, and refused to any other."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from llava_kd.config import TrainConfig, dump, load
from llava_kd.parallel.world import World
from llava_kd.training.checkpoint import refuse_newer_format, sweep, write_text

# What may change when a run goes on: where and how it is computed, not what.
MAY_CHANGE = (
    "output_dir",
    "log.",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.best",
    "evaluate",
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
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


def check_world(config: TrainConfig, world: World) -> None:
    """ValueError if this number of ranks cannot run these settings. Needs no model."""
    if config.global_batch_size % world.size:
        near = [n for n in range(1, config.global_batch_size + 1) if config.global_batch_size % n == 0]
        below = max(n for n in near if n <= world.size)
        raise ValueError(
            f"global_batch_size ({config.global_batch_size}) must be a multiple of the number of ranks, got "
            f"{world.size}; start {below} ranks, or set global_batch_size to "
            f"{-(-config.global_batch_size // world.size) * world.size}"
        )
    if config.engine.kind == "single" and world.size > 1:
        raise ValueError(
            f"engine.kind is single but {world.size} ranks run; use auto, ddp, fsdp2 or deepspeed"
        )


@contextmanager
def claim(config: TrainConfig, world: World) -> Iterator[bool]:
    """Hold the output directory during the block; True if its run is complete.

    Raises ValueError if it cannot be written, another process holds it, it holds another run, or its
    checkpoints come from a newer version.
    """
    output = Path(config.output_dir)
    with ExitStack() as held:
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
        yield (output / "run.json").is_file()


@contextmanager
def locked(output: Path, name: str = "output_dir") -> Iterator[None]:
    """Make the directory and keep other runs out of it; the system lets go of it when the process ends."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        stream = (output / ".lock").open("w")
    except OSError as error:
        raise ValueError(
            f"{name} {output} cannot be written ({error}); name a directory that this user may write"
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


def _check_config(config: TrainConfig, output: Path) -> None:
    written = output / "config.yaml"
    # A run that stopped before its first step, over a mistake in its settings or data, does not count.
    has_begun = any((output / name).exists() for name in ("metrics.jsonl", "checkpoints", "run.json"))
    if written.is_file() and not has_begun:
        return
    if written.is_file():
        if changes := differences(load(written), config):
            raise ValueError(
                f"{output} already holds another run: {'; '.join(changes)}; restore those settings, "
                "choose a new output_dir or remove it"
            )
    elif any(not path.name.startswith(".") for path in output.iterdir()):
        raise ValueError(f"{output} is not empty and holds no run; choose a new output_dir")


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
