"""The settings of a stage with those of every loss term that there is, plug-ins' own too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llava_kd import config
from llava_kd.assembly.plugins import Tables, with_plugins
from llava_kd.config import TrainConfig, stage_type


def load(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """`config.load` with the table of terms, and those of the plug-ins that the file names."""
    named = config.plugins_of(path, overrides)
    try:
        tables = with_plugins(named)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return config.load(path, overrides, terms=tables.terms)


def stage(plugins: Sequence[str] = ()) -> type[TrainConfig]:
    """The settings of a stage, those of every term among them."""
    return stage_type(TrainConfig, with_plugins(plugins).terms)


def tables_of(settings: TrainConfig) -> Tables:
    """What these settings may name."""
    return with_plugins(settings.plugins)


def labels(plugins: Sequence[str] = ()) -> dict[str, str]:
    """What a report says of each term."""
    return {name: term.label for name, term in with_plugins(plugins).terms.items()}
