"""YAML trees before they are settings: read without doubled keys, changed by dotted names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

_COMMANDS = {"stage": "train", "pipeline": "run", "grid": "ablate", "search": "search"}


class UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML loader that refuses a key given twice: plain YAML lets the second win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        doubled = sorted({str(key) for key in keys if keys.count(key) > 1})
        if doubled:
            raise ValueError(
                f"line {node.start_mark.line + 1}: the key {doubled} is given twice; give it once"
            )
        return super().construct_mapping(node, deep)


def read_tree(path: Path) -> dict:
    """The `key: value` lines of a file that is there. ValueError for anything else, and for a doubled key."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=UniqueKeyLoader)
    except RecursionError:
        raise ValueError(f"{path}: the file is nested too deeply; make it flatter") from None
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: the file must hold `key: value` lines")
    return at_home(tree)


def check_kind(tree: Mapping, wanted: str, path: Path) -> None:
    """Raises ValueError where the file is plainly of another kind than `wanted`, one of `_COMMANDS`."""
    kind = _kind(tree)
    if kind not in (wanted, None):
        raise ValueError(f"this is a {kind}, not a {wanted}: run `llava-kd {_COMMANDS[kind]} {path}`")


def _kind(tree: Mapping) -> str | None:
    keys = set(tree)
    if "arms" in keys:
        return "grid"
    if "space" in keys:
        return "search"
    if "stages" in keys:
        return "pipeline" if keys <= {"stages", "command"} else None
    return "stage" if keys & {"student", "objective", "output_dir"} else None


def at_home(tree: Any) -> Any:
    """The same, with each path that begins with ~/ below the home directory, where no shell does it."""
    if isinstance(tree, str) and tree.startswith("~/"):
        return os.path.expanduser(tree)
    if isinstance(tree, dict):
        return {key: at_home(value) for key, value in tree.items()}
    return [at_home(value) for value in tree] if isinstance(tree, list) else tree


def parse_override(override: str) -> tuple[str, object]:
    """Dotted name and value of `--a.b=value`; the value is read as YAML."""
    if not override.startswith("--") or "=" not in override:
        raise ValueError(f"an override looks like --optim.lr=1e-4; got {override!r}")
    dotted, text = override[2:].split("=", 1)
    try:
        return dotted, yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{override} is not YAML: {' '.join(str(error).split())}") from error


def set_dotted(tree: dict, dotted: str, value: object) -> None:
    """Set `a.b` in `tree`, making the sections that lead there."""
    *parents, last = dotted.split(".")
    for name in parents:
        if not isinstance(tree.get(name), dict):
            tree[name] = {}
        tree = tree[name]
    tree[last] = value
