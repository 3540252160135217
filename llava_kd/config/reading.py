"""`load` and `dump`: YAML plus dotted overrides. The only file that imports draccus."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path

import draccus
import yaml
from draccus.utils import DraccusException

from llava_kd.config.checks import check_section, check_value
from llava_kd.config.objective import ObjectiveConfig, Table, stage_type
from llava_kd.config.sections import TrainConfig
from llava_kd.config.trees import UniqueKeyLoader, at_home, check_kind, parse_override, set_dotted


def _messages(error: BaseException) -> str:
    """The chain of causes as one line, where then why, without the library's own wrapping words."""
    parts: list[str] = []
    current: BaseException | None = error
    while current is not None:
        text = re.sub(
            r"(Couldn't instantiate class \w+ using the given arguments\.:? ?)+", "", str(current)
        ).strip()
        if text and not any(text in part for part in parts):
            parts.append(text)
        current = current.__cause__
    return " ".join(": ".join(parts).split())


def load(path: str | Path, overrides: Sequence[str] = (), *, terms: Table) -> TrainConfig:
    """Read `path`, apply overrides such as `--optim.lr=1e-4` or `--teacher=null`, and check the whole.

    `terms` is the table of loss terms whose settings `objective` may hold.
    Raises ValueError for a missing file, an unknown or doubled key, a value of the wrong type, or settings
    that do not fit together; the message names the file and the key.
    """
    path = Path(path)
    with _naming(path):
        tree = _tree(path, overrides)
        stage = stage_type(TrainConfig, terms)
        check_section(tree, stage, "")
        return draccus.decode(stage, tree)


def check_early(path: str | Path, overrides: Sequence[str] = ()) -> dict:
    """The tree of a stage, checked as `load` does but for its terms, which take long to import."""
    path = Path(path)
    with _naming(path):
        tree = _tree(path, overrides)
        objective = tree.get("objective")
        if isinstance(objective, dict):
            own = {field.name for field in fields(ObjectiveConfig)}
            objective = {key: value for key, value in objective.items() if key in own}
        check_section({**tree, **({"objective": objective} if "objective" in tree else {})}, TrainConfig, "")
        return tree


def plugins_of(path: str | Path, overrides: Sequence[str] = ()) -> list[str]:
    """What `plugins` names: it decides which other settings there are. Raises ValueError as `load` does."""
    path = Path(path)
    with _naming(path):
        named = _tree(path, overrides).get("plugins", [])
        check_value(named, list[str], "plugins")
        return [str(name) for name in named]


def _tree(path: Path, overrides: Sequence[str]) -> dict:
    tree = yaml.load(path.read_text(encoding="utf-8"), Loader=UniqueKeyLoader)
    if not isinstance(tree, dict):
        raise ValueError("the file must hold `key: value` lines")
    check_kind(tree, "stage", path)
    for override in overrides:
        set_dotted(tree, *parse_override(override))
    return at_home(tree)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Whatever is wrong becomes a ValueError that names the file."""
    if not path.is_file():
        raise ValueError(f"no config file {path}; the recipes are scripts/*.yaml")
    try:
        yield
    except RecursionError:
        raise ValueError(f"{path}: the file, or an override, is nested too deeply; make it flatter") from None
    except (DraccusException, ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {_messages(error)}") from error


def plain(value: object) -> object:
    """Settings as mappings, lists and scalars, as YAML has them; draccus cannot write annotated types."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def dump(config: TrainConfig) -> str:
    """YAML text that `load` reads back into an equal tree."""
    return yaml.dump(plain(config))
