"""The language model as llama.cpp's: one row of a table a family, which says what differs there.

Read in src/models of ggml-org/llama.cpp (November 2026). Where the runtime takes a setting for granted, a
model with another one is refused: it would be loaded, and answer otherwise.

Shape legend: D width, H heads, K half of a head, R rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llava_kd.models.files.gguf.package import gguf_package
from llava_kd.models.files.gguf.weights import StockWeights
from llava_kd.models.files.gguf.writing import Entry
from llava_kd.models.tower_source import nearest


@dataclass(frozen=True, kw_only=True)
class LanguageFamily:
    """`arch`: llama.cpp's name. `neighbours`: it turns neighbouring numbers of a head, transformers halves.
    `norm_offset`: what transformers adds to the weights of a norm. `scales_pictures`: it multiplies pictures
    by the square root of the width, as the words, which transformers does not. `ignores_window`: it attends
    to everything. `tied`: it has no head of its own. `check` gives what else must hold, or None.
    """

    arch: str
    activation: str = "silu"
    neighbours: bool = False
    norm_offset: float = 0.0
    scales_pictures: bool = False
    ignores_window: bool = False
    tied: bool = False
    check: Callable[[PreTrainedConfig], str | None] = lambda config: None


def _every(config: PreTrainedConfig, period: int) -> str | None:
    """Of layers that see a window, each `period`-th sees everything."""
    wanted = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in _layers(config)]
    return None if config.layer_types == wanted else f"every {period}th layer must have full attention"


def _layers(config: PreTrainedConfig) -> range:
    return range(config.num_hidden_layers)


def _own_scale(config: PreTrainedConfig) -> str | None:
    scalar = config.query_pre_attn_scalar
    return None if scalar == config.head_dim else f"query_pre_attn_scalar must be head_dim; it is {scalar}"


def _smollm3(config: PreTrainedConfig) -> str | None:
    wanted = [int((layer + 1) % 4 != 0) for layer in _layers(config)]
    return None if config.no_rope_layers == wanted else "each 4th layer must be without positions"


_GELU = "gelu_pytorch_tanh"
FAMILIES: Mapping[str, LanguageFamily] = {
    "llama": LanguageFamily(arch="llama", neighbours=True),
    "mistral": LanguageFamily(arch="llama", neighbours=True, ignores_window=True),
    "smollm3": LanguageFamily(arch="smollm3", neighbours=True, ignores_window=True, check=_smollm3),
    "qwen2": LanguageFamily(arch="qwen2", ignores_window=True),
    "qwen3": LanguageFamily(arch="qwen3", ignores_window=True),
    "phi3": LanguageFamily(arch="phi3", ignores_window=True),
    "gemma": LanguageFamily(arch="gemma", activation=_GELU, norm_offset=1, scales_pictures=True, tied=True),
    "gemma3_text": LanguageFamily(
        arch="gemma3",
        activation=_GELU,
        norm_offset=1,
        tied=True,
        check=lambda config: _every(config, 6) or _own_scale(config),
    ),
    "olmo": LanguageFamily(arch="olmo", neighbours=True),
    "olmo2": LanguageFamily(arch="olmo2"),
}


def family_of(config: PreTrainedConfig, name: str) -> LanguageFamily:
    """Raises ValueError for a language model that llama.cpp has no map for, or would compute otherwise."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ValueError(
            f"{name} has the language model {config.model_type!r}, which there is no GGUF map for; there is "
            f"one for {sorted(FAMILIES)}{nearest(config.model_type, FAMILIES)}; take --format hf"
        )
    activation = _setting(config, "hidden_activation") or config.hidden_act
    fault = family.check(config)
    if activation not in (family.activation, {"gelu_pytorch_tanh": "gelu"}.get(family.activation)):
        fault = f"its activation must be {family.activation}; it is {activation}"
    if family.tied and not config.tie_word_embeddings:
        fault = "it must have its embedding for a head (tie_word_embeddings)"
    kinds = {_rope(config).get("rope_type", "default"), _rope(config, "sliding").get("rope_type", "default")}
    if unknown := kinds - {"default", "linear", "llama3", "longrope", "yarn"}:
        fault = f"rope_type must be default, linear, llama3, longrope or yarn; it is {sorted(unknown)}"
    if fault:
        raise ValueError(
            f"llama.cpp assumes of every {config.model_type!r} model what {name} does not have: {fault}"
        )
    return family


def _setting(config: PreTrainedConfig, name: str) -> Any:
    return getattr(config, name, None)


def head_size(config: PreTrainedConfig) -> int:
    return _setting(config, "head_dim") or config.hidden_size // config.num_attention_heads


def _rope(config: PreTrainedConfig, kind: str = "full") -> Mapping[str, Any]:
    parameters = config.rope_parameters or {}
    nested = parameters.get(f"{kind}_attention")
    return nested if nested is not None else ({} if kind == "sliding" else parameters)


def context_length(config: PreTrainedConfig, family: LanguageFamily) -> int:
    """Positions that both read alike: no more than a window that llama.cpp ignores."""
    longest, window = config.max_position_embeddings, _setting(config, "sliding_window")
    types = _setting(config, "layer_types")
    slides = window and (types is None or "sliding_attention" in types)
    return min(longest, window) if family.ignores_window and slides else longest


def describe_language(writer: Any, config: PreTrainedConfig, family: LanguageFamily) -> None:
    """Metadata of the language model, into gguf's writer."""
    size = head_size(config)
    writer.add_type("model")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_length(config, family))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(_setting(config, "num_key_value_heads") or config.num_attention_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    if family.arch == "olmo":  # its norm has no weights, and its epsilon stands in the code
        writer.add_layer_norm_eps(1e-5)
        if (clip := _setting(config, "clip_qkv")) is not None:
            writer.add_clamp_kqv(clip)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if family.arch == "phi3":
        writer.add_sliding_window(0)
    elif not family.ignores_window and _setting(config, "sliding_window"):
        writer.add_sliding_window(config.sliding_window)
    _describe_positions(writer, config, size)


def _describe_positions(writer: Any, config: PreTrainedConfig, size: int) -> None:
    gguf, rope = gguf_package(), _rope(config)
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    writer.add_rope_dimension_count(int(size * rope.get("partial_rotary_factor", 1.0)))
    if "rope_theta" in (local := _rope(config, "sliding")):
        writer.add_rope_freq_base_swa(local["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)
    if kind == "longrope":
        _, factor = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_attn_factors(factor)


def language_entries(
    weights: StockWeights, config: PreTrainedConfig, family: LanguageFamily, name: str
) -> list[Entry]:
    """Tensors of the language model's file. Raises ValueError for a weight that has no name there."""
    gguf = gguf_package()
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == family.arch)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    entries = []
    for ours, shape in weights.shapes.items():
        if not ours.startswith(("language_model.", "lm_head.")):
            continue
        theirs = ours.replace("language_model.", "model.", 1)
        found = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ValueError(
                f"{name} has the weight {ours}, which llama.cpp's {family.arch!r} does not support; take "
                "--format hf"
            )
        entries.append(Entry(name=found, shape=shape, read=_reader(weights, ours, config, family)))
    return [*_position_factors(config), *entries]


def _reader(
    weights: StockWeights, name: str, config: PreTrainedConfig, family: LanguageFamily
) -> Callable[[], Tensor]:
    part = name.rsplit(".", 2)[-2]
    if family.neighbours and part in ("q_proj", "k_proj"):
        heads = config.num_attention_heads if part == "q_proj" else config.num_key_value_heads
        return lambda: as_neighbours(weights[name], heads)
    if family.norm_offset and part.endswith("norm"):
        return lambda: weights[name].float() + family.norm_offset
    return lambda: weights[name]


def as_neighbours(weight_RD: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys, H heads of 2 K, with row k of a head beside row K + k: what one angle turns.

    A bias has rows alone. Queries and keys both, so that their products stay.
    """
    halves_H2K = weight_RD.unflatten(0, (heads, 2, -1))
    return halves_H2K.transpose(1, 2).reshape(weight_RD.shape)


def _position_factors(config: PreTrainedConfig) -> list[Entry]:
    """What llama.cpp divides frequencies by, number by number, where no formula of its own does."""
    rope = _rope(config)
    kind = rope.get("rope_type", "default")
    if kind == "llama3":
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        exponents = torch.arange(len(scaled), dtype=torch.float64) / len(scaled)
        factors = rope["rope_theta"] ** -exponents / scaled.double()
        return [_constant("rope_freqs.weight", factors)]
    if kind == "longrope":
        lists = {length: torch.tensor(rope[f"{length}_factor"]) for length in ("long", "short")}
        return [_constant(f"rope_factors_{length}.weight", values) for length, values in lists.items()]
    return []


def _constant(name: str, values: Tensor) -> Entry:
    return Entry(name=name, shape=tuple(values.shape), read=lambda: values.float(), whole=True)


def picture_scale(config: PreTrainedConfig, family: LanguageFamily) -> float:
    """What the projector's output is multiplied by, so that pictures come out as large as in training."""
    return 1 / math.sqrt(config.hidden_size) if family.scales_pictures else 1.0
