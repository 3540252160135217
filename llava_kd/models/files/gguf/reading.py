"""A language model out of a GGUF file, as transformers holds it: weights in float32, its own tokenizer.

The other way round from `language` and `tokens`, for the architectures below; what a file says and these
cannot hold is refused by its name. Weights of few bits come out as the numbers that they stand for.

Shape legend: D width, H heads, K half of a head, R rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from llava_kd.durable import replacing_folder
from llava_kd.models.files.gguf.package import gguf_package
from llava_kd.models.files.gguf.tokens import RULES
from llava_kd.models.tower_source import nearest
from llava_kd.tensor_files import share, writing


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """transformers' name of an architecture, and whether llama.cpp turns neighbouring numbers of a head."""

    model_type: str
    neighbours: bool


KINDS: Mapping[str, _Kind] = {
    "llama": _Kind(model_type="llama", neighbours=True),
    "qwen2": _Kind(model_type="qwen2", neighbours=False),
}
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # llama.cpp's kinds of pieces


def gguf_file(source: str | Path) -> Path | None:
    """The GGUF file that is meant: the file itself, or the only one of a folder without a config.json.

    Raises ValueError where a folder holds several.
    """
    source = Path(source)
    if source.is_file():
        return source if source.suffix == ".gguf" else None
    found = sorted(source.glob("*.gguf"))
    if not found or (source / "config.json").is_file():
        return None
    if len(found) > 1:
        raise ValueError(f"{source} holds {len(found)} GGUF files; name one of them, such as {found[0]}")
    return found[0]


def read_language_model(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model, in float32, and its tokenizer.

    Raises ValueError for a file that is cut or of another architecture, for positions that are scaled, and
    for a tokenizer whose rule is not known.
    """
    gguf = gguf_package()
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ValueError(f"{path} is no whole GGUF file ({error}); fetch it again") from error
    said = {name: field.contents() for name, field in reader.fields.items()}
    arch = str(said.get("general.architecture"))
    if arch not in KINDS:
        raise ValueError(
            f"{path} is of the architecture {arch!r}; `llava-kd convert` reads GGUF files of "
            f"{', '.join(KINDS)}{nearest(arch, KINDS)}; for another one convert what it was made from"
        )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(said, arch, tensors, path)
    return _model(config, arch, tensors, path), _tokenizer(said, path)


def _config(said: Mapping[str, Any], arch: str, tensors: Mapping[str, Any], path: Path) -> PreTrainedConfig:
    def of(name: str, default: Any = None) -> Any:
        value = said.get(f"{arch}.{name}", default)
        if value is None:
            raise ValueError(f"{path} lacks {arch}.{name}: it is not a whole language model")
        return value

    scaling = said.get(f"{arch}.rope.scaling.type", "none")
    if scaling not in ("none", "") or any(name.startswith("rope_") for name in tensors):
        raise ValueError(f"{path} scales its positions ({scaling}), which is not read; take another file")
    heads, width = of("attention.head_count"), of("embedding_length")
    if "token_embd.weight" not in tensors:
        raise ValueError(f"{path} has no token_embd.weight: it is no language model")
    size = said.get(f"{arch}.attention.key_length", width // heads)
    settings: dict[str, Any] = {
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": width,
        "intermediate_size": of("feed_forward_length"),
        "num_hidden_layers": of("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": of("attention.head_count_kv", heads),
        "max_position_embeddings": of("context_length"),
        "rms_norm_eps": of("attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_theta": of("rope.freq_base", 10000.0), "rope_type": "default"},
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": arch == "llama" and "blk.0.attn_q.bias" in tensors,
    }
    if size * heads != width:
        settings["head_dim"] = size
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        settings[f"{name}_token_id"] = said.get(f"tokenizer.ggml.{key}_token_id")
    return AutoConfig.for_model(KINDS[arch].model_type, **settings)


def _model(config: PreTrainedConfig, arch: str, tensors: Mapping[str, Any], path: Path) -> PreTrainedModel:
    gguf = gguf_package()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    key = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    names = gguf.get_tensor_name_map(key, config.num_hidden_layers)
    state, used = {}, set()
    for ours, wanted in model.state_dict().items():
        if ours == "lm_head.weight" and config.tie_word_embeddings:
            continue
        theirs = names.get_name(ours, try_suffixes=(".weight", ".bias"))
        if theirs not in tensors:
            raise ValueError(f"{path} has no weight {theirs} (of {ours}): it is no whole {arch} model")
        tensor = _numbers(tensors[theirs], path)
        part = ours.rsplit(".", 2)[-2]
        if KINDS[arch].neighbours and part in ("q_proj", "k_proj"):
            q = part == "q_proj"
            tensor = from_neighbours(tensor, config.num_attention_heads if q else config.num_key_value_heads)
        if tensor.shape != wanted.shape:
            raise ValueError(
                f"{theirs} of {path} is {tuple(tensor.shape)} where its settings need {tuple(wanted.shape)}"
            )
        state[ours] = tensor
        used.add(theirs)
    if spare := sorted(set(tensors) - used):
        raise ValueError(f"{path} has the weight {spare[0]} ({len(spare)} such), which {arch} does not have")
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    return model


def _numbers(tensor: Any, path: Path) -> Tensor:
    gguf = gguf_package()
    try:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise ValueError(
            f"{path} has {tensor.name} in the type {tensor.tensor_type.name}, which the package gguf does "
            "not read; take a file of another type, such as Q8_0"
        ) from error
    found = torch.from_numpy(np.array(values, dtype=np.float32))
    return found.reshape([int(size) for size in reversed(tensor.shape)])


def from_neighbours(weight_RD: Tensor, heads: int) -> Tensor:
    """`as_neighbours` taken back: row k of a head and row K + k, which stand side by side in the file."""
    pairs_HK2 = weight_RD.unflatten(0, (heads, -1, 2))
    return pairs_HK2.transpose(1, 2).reshape(weight_RD.shape)


def _tokenizer(said: Mapping[str, Any], path: Path) -> PreTrainedTokenizerFast:
    kind, rule = said.get("tokenizer.ggml.model"), str(said.get("tokenizer.ggml.pre", "gpt-2"))
    if kind != "gpt2":
        raise ValueError(
            f"{path} has a tokenizer of kind {kind!r}; read are those of bytes and merges, 'gpt2'"
        )
    if rule not in RULES:
        raise ValueError(
            f"{path} splits words by the rule {rule!r}; supported are "
            f"{', '.join(RULES)}{nearest(rule, RULES)}"
        )
    pieces, kinds = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    added = [
        {
            **{"id": row, "content": piece, "special": kinds[row] == _CONTROL, "normalized": False},
            **{"single_word": False, "lstrip": False, "rstrip": False},
        }
        for row, piece in enumerate(pieces)
        if kinds[row] in (_CONTROL, _USER_DEFINED)
    ]
    pre_tokenizer, ignores_merges = RULES[rule]
    no_space = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    merges = [merge.split(" ") for merge in said["tokenizer.ggml.merges"]]
    tree = {
        **{"version": "1.0", "truncation": None, "padding": None, "normalizer": None},
        **{"added_tokens": added, "pre_tokenizer": _whole(pre_tokenizer), "post_processor": None},
        "decoder": no_space,
        "model": {
            **{"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False},
            **{"continuing_subword_prefix": None, "end_of_word_suffix": None},
            "ignore_merges": ignores_merges,
            "vocab": {piece: row for row, piece in enumerate(pieces) if kinds[row] != _UNUSED},
            "merges": merges,
        },
    }
    tokens = {
        f"{name}_token": pieces[said[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if f"tokenizer.ggml.{key}_token_id" in said
    }
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(tree)), **tokens)
    tokenizer.chat_template = said.get("tokenizer.chat_template")
    return tokenizer


def _whole(rule: Any) -> Any:
    """A rule with the parts that its reader wants written out."""
    if isinstance(rule, list):
        return [_whole(part) for part in rule]
    if not isinstance(rule, Mapping):
        return rule
    whole = {key: _whole(value) for key, value in rule.items()}
    if whole.get("type") == "ByteLevel":
        whole = {"trim_offsets": True, "use_regex": True, **whole}
    return whole


def write_language_model(path: Path, out: str | Path) -> None:
    """A folder of transformers for `student.language_model`, complete or not at all."""
    causal, tokenizer = read_language_model(path)
    out = Path(out)
    with replacing_folder(out) as scratch, writing(out):
        causal.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        share(*scratch.glob("*.safetensors"))
