"""Stages one after the other: finished ones are skipped, a broken one goes on."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import yaml

from llava_kd.build.run_dir import differences
from llava_kd.config import TrainConfig, load

_COMMAND = f"{shlex.quote(sys.executable)} -m llava_kd.cli train"
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage file, what is changed in it, and the settings that result."""

    path: Path
    overrides: tuple[str, ...]
    config: TrainConfig

    @property
    def output(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def is_complete(self) -> bool:
        return (self.output / "run.json").is_file()


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """`command` starts one stage: the words before the stage file and its overrides."""

    command: tuple[str, ...]
    stages: tuple[Stage, ...]


def read_pipeline(path: str | Path, overrides: Sequence[str] = ()) -> Pipeline:
    """Read `path` and every stage in it; `overrides` go to all stages.

    Raises ValueError if a stage does not load, or two of them write into the same directory.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no pipeline file {path}; an example is scripts/pipeline.yaml")
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(tree, dict) or not set(tree) <= {"stages", "command"} or not tree.get("stages"):
        raise ValueError(f"{path} must hold `stages`, a list, and at most `command` beside it; got {tree!r}")
    stages = tuple(_stage(entry, path, overrides) for entry in tree["stages"])
    outputs = [stage.output.absolute() for stage in stages]
    if doubled := {str(output) for output in outputs if outputs.count(output) > 1}:
        raise ValueError(f"{path}: every stage needs its own output_dir; {sorted(doubled)} comes twice")
    return Pipeline(command=tuple(shlex.split(tree.get("command") or _COMMAND)), stages=stages)


def _stage(entry: object, path: Path, overrides: Sequence[str]) -> Stage:
    if not isinstance(entry, dict) or "config" not in entry or not set(entry) <= {"config", "overrides"}:
        raise ValueError(
            f"{path}: a stage has `config`, a file, and `overrides`, `key: value` lines; got {entry!r}"
        )
    config = path.parent / str(entry["config"])
    own = entry.get("overrides") or {}
    if not isinstance(own, dict):
        raise ValueError(
            f"{path}: the overrides of {entry['config']} must be `key: value` lines; got {own!r}"
        )
    words = (*(f"--{key}={_text(value)}" for key, value in own.items()), *overrides)
    return Stage(path=config, overrides=words, config=load(config, words))


def _text(value: object) -> str:
    """One line of YAML."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).replace("\n...\n", "").strip()


def run_pipeline(pipeline: Pipeline, say: Callable[[str], None] = print) -> bool:
    """Run what is not complete, in order. False if a signal stopped a stage, which the same call continues.

    Raises ValueError if a stage fails, or a complete one was run with other settings.
    """
    for number, stage in enumerate(pipeline.stages, start=1):
        name = f"stage {number} of {len(pipeline.stages)}, {stage.path.name} into {stage.output}"
        if stage.is_complete:
            if changes := differences(load(stage.output / "config.yaml"), stage.config):
                raise ValueError(f"{name} is complete with other settings: {'; '.join(changes)}")
            say(f"{name}: complete, skipped")
            continue
        say(f"{name}: starts")
        status = _run([*pipeline.command, str(stage.path), *stage.overrides])
        if status != 0:
            raise ValueError(f"{name} failed with status {status}; mend it, and the same command goes on")
        if not stage.is_complete:
            say(f"{name}: stopped after a checkpoint; the same command goes on")
            return False
    return True


def _run(command: Sequence[str]) -> int:
    """Exit status; signals that ask for a stop go to the stage, which writes a checkpoint."""
    with subprocess.Popen(command) as process:

        def forward(number: int, _frame: FrameType | None) -> None:
            process.send_signal(number)

        previous = {number: signal.signal(number, forward) for number in _FORWARDED}
        try:
            return process.wait()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
