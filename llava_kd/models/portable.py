"""The files of an exported directory as tools beside transformers 5 read them; transformers reads both.

A SigLIP or CLIP tower is written with the inner `vision_model.` of its names, which transformers 4 wrote, and
vLLM's SiglipVisionModel and CLIPVisionModel have (vllm/model_executor/models/siglip.py, llava.py, read in
November 2026). SigLIP's pooling head is left out, with `vision_use_head: false`: no token of a LLaVA passes
it, but versions of vLLM before vllm-project/vllm#32299 (January 2026) pooled with it. llama.cpp and vLLM
choose the language model by `text_config.architectures`, so it is filled in (llama.cpp, conversion/base.py).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import LlavaConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llava_kd.models.vision_tower import text_config, vision_config

INNER_TOWERS = ("siglip_vision_model", "clip_vision_model")


def make_portable(directory: Path, config: LlavaConfig) -> None:
    """Rewrite the weights, their index and `config.json` of a stock directory, file by file."""
    tree = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if not tree["text_config"].get("architectures"):
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text_config(config).model_type]
        tree["text_config"]["architectures"] = [model_class]
    if vision_config(config).model_type in INNER_TOWERS:
        if vision_config(config).model_type == "siglip_vision_model":  # transformers 5.17 does not write it
            tree["vision_config"]["vision_use_head"] = False
        left_out = sum(_rename_weights(path) for path in sorted(directory.glob("*.safetensors")))
        index = directory / "model.safetensors.index.json"
        if index.is_file():
            _rename_index(index, left_out)
    _write(directory / "config.json", tree)


def portable_name(name: str) -> str | None:
    """The name of a weight in the export; None for one that is left out."""
    before, tower, inner = name.partition("vision_tower.")
    if not tower:
        return name
    inner = inner.removeprefix("vision_model.")
    return None if inner.startswith("head.") else f"{before}{tower}vision_model.{inner}"


def _rename_weights(path: Path) -> int:
    """Bytes that were left out."""
    state = load_file(path)
    named = {name: tensor for old, tensor in state.items() if (name := portable_name(old)) is not None}
    scratch = path.with_suffix(".partial")
    save_file(named, scratch, metadata={"format": "pt"})
    os.replace(scratch, path)
    sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in (state, named)]
    return sizes[0] - sizes[1]


def _rename_index(path: Path, left_out: int) -> None:
    tree = json.loads(path.read_text(encoding="utf-8"))
    files = tree["weight_map"].items()
    tree["weight_map"] = {name: file for old, file in files if (name := portable_name(old)) is not None}
    if "total_size" in tree.get("metadata", {}):
        tree["metadata"]["total_size"] -= left_out
    _write(path, tree)


def _write(path: Path, tree: dict) -> None:
    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
