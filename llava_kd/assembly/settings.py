"""The settings of a stage with those of every loss term that there is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llava_kd import config
from llava_kd.config import TrainConfig, stage_type
from llava_kd.distill.terms import TERMS


def load(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """`config.load` with the table of terms."""
    return config.load(path, overrides, terms=TERMS)


def stage() -> type[TrainConfig]:
    """The settings of a stage, those of every term among them."""
    return stage_type(TrainConfig, TERMS)


def labels() -> dict[str, str]:
    """What a report says of each term."""
    return {name: term.label for name, term in TERMS.items()}
