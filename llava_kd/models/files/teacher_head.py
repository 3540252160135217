"""A stock model of which only the head is there, and the hash of a checkpoint that nobody has to load.

Shape legend: V vocabulary, D width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from llava_kd.models.files.checkpoint import Parts
from llava_kd.models.fingerprint import weights_fingerprint
from llava_kd.models.reading import existing, read_config, readable

_SAYS_NOTHING = ("transformers_version", "dtype", "torch_dtype", "_name_or_path", "architectures")


def load_head_only(name: str, head_VD: Tensor, bias_V: Tensor | None) -> Parts:
    """A stock LLaVA directory or hub id with this head; every other weight is without memory.

    Raises ValueError where the head is not of that model's shape.
    """
    config = _llava_config(name)
    with torch.device("meta"):
        stock = LlavaForConditionalGeneration(config)
    if stock.lm_head.weight.shape != head_VD.shape:
        raise ValueError(
            f"the head must have the shape of {name}'s, {list(stock.lm_head.weight.shape)}; got "
            f"{list(head_VD.shape)}"
        )
    stock.lm_head.weight = nn.Parameter(head_VD, requires_grad=False)
    bias = None if bias_V is None else nn.Parameter(bias_V, requires_grad=False)
    stock.lm_head.register_parameter("bias", bias)
    with readable("the processor of", name):
        processor = LlavaProcessor.from_pretrained(name)
    return Parts(stock=stock, processor=processor)


def checkpoint_fingerprint(name: str) -> str:
    """SHA-256 over the weights of a stock directory or hub id as they are on disk, however they are split."""
    existing(name, "the teacher")
    with readable("the weights of", name):
        folder = Path(
            name if Path(name).is_dir() else snapshot_download(name, allow_patterns="*.safetensors")
        )
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise ValueError(f"{name} has no safetensors file; save its weights as safetensors")
        return weights_fingerprint(_OnDisk(paths))


def config_fingerprint(name: str) -> str:
    """SHA-256 over what a model's configuration says of its computation."""
    config = read_config(existing(name, "the teacher"))
    text = json.dumps(_said(config.to_dict()), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _llava_config(name: str) -> LlavaConfig:
    config = read_config(existing(name, "the LLaVA checkpoint"))
    if not isinstance(config, LlavaConfig):
        raise ValueError(f"{name} is a {config.model_type!r} model; a LLaVA checkpoint must be 'llava'")
    return config


def _said(tree: dict) -> dict:
    kept = {key: value for key, value in tree.items() if key not in _SAYS_NOTHING}
    return {key: _said(value) if isinstance(value, dict) else value for key, value in kept.items()}


class _OnDisk(Mapping[str, Tensor]):
    """Tensors of safetensors files, each mapped when it is asked for."""

    def __init__(self, paths: list[Path]) -> None:
        self._files = {}
        for path in paths:
            file = safe_open(path, framework="pt")
            self._files |= dict.fromkeys(file.keys(), file)

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
