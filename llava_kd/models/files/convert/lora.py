"""The adapters that TinyLLaVA's LoRA recipe leaves beside the weights they were put on, merged into them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from llava_kd.models.files.convert.weights import read_tensors
from llava_kd.models.reading import read_json

CONFIG = "adapter_config.json"
_FACTOR = re.compile(r"base_model\.model\.(\w+)\.(.+)\.lora_([AB])(?:\.default)?\.weight")
_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def merged(source: Path, states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """The weights of each part with B A, scaled, added to those that have an adapter.

    Raises ValueError for adapters of another kind, or of weights that are not there.
    """
    scale = _scale(source, read_json(source / CONFIG))
    file = next((source / name for name in _FILES if (source / name).is_file()), None)
    if file is None:
        raise ValueError(f"{source} is an incomplete download: it has {CONFIG} but no {_FILES[0]}")
    result = {
        part: {name.replace(".base_layer", ""): tensor for name, tensor in state.items()}
        for part, state in states.items()
    }
    factors: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, tensor in read_tensors(file).items():
        match = _FACTOR.fullmatch(name)
        if match is None:
            raise ValueError(f"{file} holds {name}, which is no factor of a LoRA adapter: merge it with peft")
        part, inner, factor = match.groups()
        inner = inner.removeprefix("_vision_tower.") if part == "vision_tower" else inner
        factors.setdefault((part, f"{inner}.weight"), {})[factor] = tensor
    for (part, name), pair in factors.items():
        if name not in result.get(part, {}) or set(pair) != {"A", "B"}:
            raise ValueError(f"{file} does not fit: {part}.{name} has {sorted(pair)} or is not in {source}")
        result[part][name] = result[part][name] + scale * (pair["B"] @ pair["A"])
    return result


def _scale(source: Path, config: Mapping) -> float:
    """Raises ValueError for what is more than a plain product of two factors."""
    more = ("use_dora", "fan_in_fan_out", "modules_to_save", "rank_pattern", "alpha_pattern")
    found = [key for key in more if config.get(key)]
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if config.get("peft_type", "LORA") != "LORA" or found or not isinstance(rank, int) or rank < 1:
        raise ValueError(
            f"{source} has adapters that are not plain LoRA ({config.get('peft_type')} of rank {rank}"
            f"{', with ' + ', '.join(found) if found else ''}): merge them with peft, and convert the result"
        )
    assert isinstance(alpha, int | float)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
