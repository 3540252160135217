"""Model files of transformers read with errors that say which file, and no weight drawn in silence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from llava_kd.models.tower_source import nearest_neighbours


def existing(name: str, what: str) -> str:
    """`name` if it is a directory or could be a hub id; ValueError for a path that is not there."""
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{what} {name} has no config.json: it is not a model directory")
        return name
    looks_like_a_path = path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1
    if looks_like_a_path or (path.parent.is_dir() and str(path.parent) != "."):
        raise ValueError(
            f"{what} {name} does not exist{nearest_neighbours(path)}; give a model directory or a hub id "
            "such as org/name"
        )
    return name


@contextmanager
def readable(what: str, name: str) -> Iterator[None]:
    """Files of `name` that are missing or broken become a ValueError of one line."""
    try:
        yield
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{what} {name} cannot be read: {' '.join(str(error).split())}") from error


def read_config(name: str) -> PreTrainedConfig:
    with readable("the config of", name):
        return AutoConfig.from_pretrained(name)


def read_pretrained(kind: type, name: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model of class `kind`; ValueError if a weight is missing, which would be drawn at random."""
    with readable("the weights of", name):
        model, info = kind.from_pretrained(name, dtype=dtype, output_loading_info=True)
    assert isinstance(model, PreTrainedModel)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{name} lacks {len(missing)} weights of a {type(model).__name__}: {missing[:3]} ..."
        )
    return model
