"""Stages one after the other: finished ones are skipped, a broken one goes on."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from llava_kd.assembly.runs.children import Children
from llava_kd.assembly.runs.run_dir import differences
from llava_kd.assembly.runs.stopping import status_of_rest
from llava_kd.assembly.settings import load
from llava_kd.config import TrainConfig
from llava_kd.config.trees import check_kind, read_tree

_COMMAND = f"{shlex.quote(sys.executable)} -m llava_kd.cli train"


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
        raise ValueError(f"no pipeline file {path}; scripts/pipeline.yaml is an example")
    tree = read_tree(path)
    check_kind(tree, "pipeline", path)
    if not set(tree) <= {"stages", "command"} or not tree.get("stages"):
        given = ", ".join(map(str, tree)) or "no key"
        raise ValueError(f"{path} must contain `stages` (a list) and optionally `command`; got {given}")
    if not isinstance(tree["stages"], list):
        raise ValueError(
            f"{path}: `stages` must be a list of entries with `config`; got {tree['stages']!r:.80}"
        )
    stages = tuple(_stage(entry, path, overrides) for entry in tree["stages"])
    outputs = [stage.output.absolute() for stage in stages]
    if doubled := {str(output) for output in outputs if outputs.count(output) > 1}:
        raise ValueError(
            f"{path}: every stage needs its own output_dir; {sorted(doubled)} is used twice: change one"
        )
    return Pipeline(command=command_words(tree.get("command") or _COMMAND, path), stages=stages)


def command_words(text: object, path: Path) -> tuple[str, ...]:
    """Its words; scripts among them are found beside the pipeline file, like stage files."""
    words = shlex.split(str(text))
    for i, word in enumerate(words):
        beside = path.parent / word
        if word.endswith(".sh") and beside.is_file():
            words[i] = str(beside)
        elif word.endswith(".sh") and not Path(word).is_file():
            raise ValueError(
                f"{path}: `command` names the script {word}, but it is not in {path.parent}: correct the path"
            )
    return tuple(words)


def _stage(entry: object, path: Path, overrides: Sequence[str]) -> Stage:
    if not isinstance(entry, dict) or "config" not in entry or not set(entry) <= {"config", "overrides"}:
        raise ValueError(
            f"{path}: a stage must have `config` (a file), and may have `overrides`; got {entry!r}"
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


def run_pipeline(pipeline: Pipeline, say: Callable[[str], None] = print) -> int:
    """Run what is not complete, in order. 0 if all are then, or 128 and the signal that stopped it (Ctrl-C:
    130, SIGTERM: 143); the same call then goes on.

    Raises ValueError if a stage fails, or a complete one was run with other settings.
    """
    with Children() as stops:
        return _run_stages(pipeline, say, stops)


def _run_stages(pipeline: Pipeline, say: Callable[[str], None], stops: Children) -> int:
    for number, stage in enumerate(pipeline.stages, start=1):
        name = f"stage {number} of {len(pipeline.stages)}, {stage.path.name} into {stage.output}"
        if stage.is_complete:
            if changes := differences(load(stage.output / "config.yaml"), stage.config):
                raise ValueError(f"{name} is complete, but with other settings: {'; '.join(changes)}")
            say(f"{name}: complete, skipped")
            continue
        say(f"{name}: starts")
        status = _run([*pipeline.command, str(stage.path), *stage.overrides], stops)
        if status == 0 and stage.is_complete and number == len(pipeline.stages):
            return 0  # whatever came after its end stopped nothing
        if stop := stops.explained(status):
            say(f"{name}: stopped by {stop.name}; run the same command again to continue")
            return status_of_rest(stop)
        if status != 0:
            raise ValueError(
                f"{name} failed with status {status}; fix it, then run the same command again to continue"
            )
        if not stage.is_complete:
            say(f"{name}: stopped after a checkpoint; run the same command again to continue")
            return status_of_rest(signal.SIGTERM)  # it was sent to the stage alone
    return 0


def _run(command: Sequence[str], stops: Children) -> int:
    return stops.run(command)
