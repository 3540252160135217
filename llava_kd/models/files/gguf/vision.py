"""Tower and projector as llama.cpp's vision file: architecture `clip`, projector `mlp`.

Read in tools/mtmd/clip.cpp and models/llava.cpp of ggml-org/llama.cpp (November 2026): the graph of `mlp`
goes through the layers that `clip.vision.feature_layer` names, drops a class token wherever there is one, and
has two linear layers with a GELU between. A final normalisation would be applied, so none is written: the
hidden states that LLaVA reads are without it.

Shape legend: E tower width, I width inside the projector, D width of the language model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaProcessor

from llava_kd.models.files.gguf.weights import StockWeights
from llava_kd.models.files.gguf.writing import Entry
from llava_kd.models.projectors.conv_attention import ConvAttentionConfig
from llava_kd.models.projectors.reused import ReusedProjectorConfig
from llava_kd.models.tower_source import nearest
from llava_kd.models.towers.vision_tower import feature_layer, input_size, text_config, vision_config

ARCHITECTURE = "clip"
# By kind of tower: how the stock strategy must be for what llama.cpp does with the first token.
_STRATEGIES = {"siglip_vision_model": "full", "clip_vision_model": "default"}
_GELU = {"gelu_pytorch_tanh": True, "gelu": True, "gelu_new": True, "gelu_fast": True, "quick_gelu": False}
_WHOLE = ("v.patch_embd.weight", "v.position_embd.weight", "v.class_embd")


def check_vision(config: LlavaConfig, processor: LlavaProcessor, name: str) -> None:
    """ValueError for what the vision file has no words for."""
    vision = vision_config(config)
    if isinstance(config, ConvAttentionConfig):
        raise ValueError(
            f"{name} has the connector conv_attention, which llama.cpp's vision file cannot describe; train "
            "a student with projector: own"
        )
    if vision.model_type not in _STRATEGIES:
        raise ValueError(
            f"{name} has the tower {vision.model_type!r}, which llama.cpp's vision file has no map for; it "
            f"has {sorted(_STRATEGIES)}{nearest(vision.model_type, _STRATEGIES)}; take --format hf"
        )
    strategy = _STRATEGIES[vision.model_type]
    if config.vision_feature_select_strategy != strategy:
        raise ValueError(
            f"{name} has vision_feature_select_strategy {config.vision_feature_select_strategy!r}; llama.cpp "
            f"drops a class token where a tower has one, so {vision.model_type!r} needs {strategy!r}"
        )
    if vision.hidden_act not in _GELU:
        raise ValueError(
            f"{name} has a tower with hidden_act {vision.hidden_act!r}; llama.cpp has {sorted(_GELU)}"
        )
    if config.projector_hidden_act != "gelu" or not config.multimodal_projector_bias:
        raise ValueError(
            f"{name} has a projector with {config.projector_hidden_act!r} and bias "
            f"{config.multimodal_projector_bias}; llama.cpp's `mlp` is gelu with biases"
        )
    height, width = input_size(processor.image_processor)
    if height != width:
        raise ValueError(f"{name} reads images of {height} x {width}; llama.cpp's vision file is for squares")
    if layers_read(config) < 1:
        raise ValueError(f"{name} reads the tower before its first layer; llama.cpp reads one at least")


def layers_read(config: LlavaConfig) -> int:
    """Layers that a token passes before the projector: hidden state n is what n layers gave."""
    layer = feature_layer(config)
    return layer if layer >= 0 else vision_config(config).num_hidden_layers + 1 + layer


def describe_vision(writer: Any, config: LlavaConfig, processor: LlavaProcessor) -> None:
    """Metadata of the vision file, into gguf's writer."""
    vision, images = vision_config(config), processor.image_processor.to_dict()
    writer.add_type("mmproj")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_projection_dim(text_config(config).hidden_size)
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_block_count(layers_read(config))
    writer.add_array("clip.vision.feature_layer", [layers_read(config)])
    writer.add_vision_use_gelu(_GELU[vision.hidden_act])
    writer.add_vision_image_mean([float(value) for value in images["image_mean"]])
    writer.add_vision_image_std([float(value) for value in images["image_std"]])


def vision_entries(weights: StockWeights, config: LlavaConfig, *, picture_scale: float) -> list[Entry]:
    """Tensors of the vision file; the projector's output is multiplied by `picture_scale`."""
    entries = [*_tower(weights, config), *_projector(weights, config, picture_scale)]
    return [
        Entry(name=e.name, shape=e.shape, read=e.read, whole=e.whole or e.name in _WHOLE) for e in entries
    ]


def _tower(weights: StockWeights, config: LlavaConfig) -> list[Entry]:
    embeddings = "vision_tower.embeddings."
    names = {
        f"{embeddings}class_embedding": "v.class_embd",
        f"{embeddings}patch_embedding.weight": "v.patch_embd.weight",
        f"{embeddings}patch_embedding.bias": "v.patch_embd.bias",
        f"{embeddings}position_embedding.weight": "v.position_embd.weight",
        "vision_tower.pre_layrnorm.weight": "v.pre_ln.weight",
        "vision_tower.pre_layrnorm.bias": "v.pre_ln.bias",
    }
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.out_proj": "attn_out",
        "layer_norm1": "ln1",
        "layer_norm2": "ln2",
        "mlp.fc1": "ffn_up",
        "mlp.fc2": "ffn_down",
    }
    for layer in range(layers_read(config)):
        for theirs, ours in parts.items():
            for kind in ("weight", "bias"):
                name = f"vision_tower.encoder.layers.{layer}.{theirs}.{kind}"
                names[name] = f"v.blk.{layer}.{ours}.{kind}"
    return [
        Entry(name=ours, shape=weights.shapes[theirs], read=lambda theirs=theirs: weights[theirs])
        for theirs, ours in names.items()
        if theirs in weights.shapes
    ]


def _projector(weights: StockWeights, config: LlavaConfig, scale: float) -> list[Entry]:
    """`mm.0` and `mm.2`; the map of a student with its teacher's projector is folded into the second."""
    part = "multi_modal_projector."
    width = text_config(config).hidden_size
    inner = weights.shapes[f"{part}linear_1.weight"][0]

    def second(kind: str) -> Tensor:
        value = weights[f"{part}linear_2.{kind}"].double()
        if isinstance(config, ReusedProjectorConfig):
            carry_DI = weights[f"{part}width_map.weight"].double()
            value = carry_DI @ value
            if kind == "bias":
                value = value + weights[f"{part}width_map.bias"].double()
        return (value * scale).to(torch.float32)

    first = [
        Entry(
            name=f"mm.0.{kind}",
            shape=weights.shapes[f"{part}linear_1.{kind}"],
            read=lambda kind=kind: weights[f"{part}linear_1.{kind}"],
        )
        for kind in ("weight", "bias")
    ]
    shapes = {"weight": (width, inner), "bias": (width,)}
    return [
        *first,
        *(
            Entry(name=f"mm.2.{kind}", shape=shapes[kind], read=lambda kind=kind: second(kind))
            for kind in shapes
        ),
    ]
