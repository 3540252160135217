"""The files of an exported directory as tools beside transformers 5 read them; transformers reads both.

A SigLIP or CLIP tower is written with the inner `vision_model.` of its names, which transformers 4 wrote, and
vLLM's SiglipVisionModel and CLIPVisionModel have (vllm/model_executor/models/siglip.py, llava.py, read in
November 2026). SigLIP's pooling head is left out, with `vision_use_head: false`: no token of a LLaVA passes
it, but versions of vLLM before vllm-project/vllm#32299 (January 2026) pooled with it. llama.cpp and vLLM
choose the language model by `text_config.architectures`, so it is filled in (llama.cpp, conversion/base.py).

transformers 4, on which many of these tools stand, knows neither `rope_parameters`, in whose absence it
computes with a base of 10,000 in silence, nor the tokenizer class and lists of special tokens that
transformers 5 writes, and wants the image processor in a file of its own.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors.torch import load_file
from transformers import LlavaConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llava_kd.models.towers.vision_tower import text_config, vision_config
from llava_kd.tensor_files import write_tensors

INNER_TOWERS = ("siglip_vision_model", "clip_vision_model")
# Of a tokenizer's settings: where it was read from, and what calls of it were given.
_OF_THIS_MACHINE = ("backend", "is_local", "local_files_only", "model_specific_special_tokens")
_OF_A_CALL = ("max_length", "pad_to_multiple_of", "stride", "truncation_strategy")


def make_portable(directory: Path, config: LlavaConfig) -> None:
    """Rewrite the weights, their index and the settings of a stock directory, file by file."""
    tree = _read(directory / "config.json")
    if not tree["text_config"].get("architectures"):
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text_config(config).model_type]
        tree["text_config"]["architectures"] = [model_class]
    for part in (tree["text_config"], tree["vision_config"]):
        part |= rope_of_transformers_4(part.get("rope_parameters"))
    if vision_config(config).model_type in INNER_TOWERS:
        if vision_config(config).model_type == "siglip_vision_model":  # transformers 5.17 does not write it
            tree["vision_config"]["vision_use_head"] = False
        left_out = sum(_rename_weights(path) for path in sorted(directory.glob("*.safetensors")))
        index = directory / "model.safetensors.index.json"
        if index.is_file():
            _rename_index(index, left_out)
    _write(directory / "config.json", tree)
    tokenizer = directory / "tokenizer_config.json"
    _write(tokenizer, tokenizer_of_transformers_4(_read(tokenizer)))
    processor = _read(directory / "processor_config.json")
    images = {**processor["image_processor"], "processor_class": processor["processor_class"]}
    _write(directory / "preprocessor_config.json", images)


def rope_of_transformers_4(parameters: dict | None) -> dict:
    """`rope_theta`, `rope_scaling` and what else of the positions stood in a config of its own there."""
    if not parameters:
        return {}
    flat = parameters.get("full_attention", parameters)
    apart = ("rope_theta", "partial_rotary_factor")
    scaling = {key: value for key, value in flat.items() if key not in apart}
    found = {key: flat[key] for key in apart if key in flat}
    if "sliding_attention" in parameters:
        found["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
    if scaling.get("rope_type", "default") == "longrope":  # three keys there, and the fourth in the config
        found["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
        scaling = {"type": "longrope", **{key: scaling[key] for key in ("short_factor", "long_factor")}}
    if scaling.get("rope_type") != "default":
        found["rope_scaling"] = scaling
    return found


def tokenizer_of_transformers_4(tree: dict) -> dict:
    """`tokenizer_config.json` for both: the class that takes `tokenizer.json` as it is."""
    named = tree.get("model_specific_special_tokens") or {}
    extra = tree.get("extra_special_tokens") or []
    if isinstance(extra, dict):
        named, extra = {**extra, **named}, []
    dropped = (*_OF_THIS_MACHINE, *_OF_A_CALL)
    kept = {key: value for key, value in tree.items() if key not in dropped and value is not None}
    return kept | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "additional_special_tokens": extra,
        "extra_special_tokens": named,
    }


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
    write_tensors(named, scratch, metadata={"format": "pt"})
    os.replace(scratch, path)
    sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in (state, named)]
    return sizes[0] - sizes[1]


def _rename_index(path: Path, left_out: int) -> None:
    tree = _read(path)
    files = tree["weight_map"].items()
    tree["weight_map"] = {name: file for old, file in files if (name := portable_name(old)) is not None}
    if "total_size" in tree.get("metadata", {}):
        tree["metadata"]["total_size"] -= left_out
    _write(path, tree)


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, tree: dict) -> None:
    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
