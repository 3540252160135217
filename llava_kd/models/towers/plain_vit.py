"""Plain ViTs of timm and open_clip as stock transformers classes, so that a student with them stays stock.

A ViT is taken apart into weights under names of our own, and put together as the stock class of its kind.
Whoever calls checks that the tokens agree; nothing here is trusted by name.

Shape legend: E width, F three times the width, N positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

_ACTIVATIONS: Mapping[str, str] = {
    "GELU": "gelu",
    "GELUTanh": "gelu_pytorch_tanh",
    "QuickGELU": "quick_gelu",
}
_TIMM_BLOCK: Mapping[str, str] = {
    **{"norm1": "norm1", "norm2": "norm2", "attn.proj": "o", "mlp.fc1": "fc1", "mlp.fc2": "fc2"},
    **{"ls1.gamma": "scale1", "ls2.gamma": "scale2"},
}
_OPEN_CLIP_BLOCK: Mapping[str, str] = {
    **{"ln_1": "norm1", "ln_2": "norm2", "attn.out_proj": "o", "mlp.c_fc": "fc1", "mlp.c_proj": "fc2"},
}
_CLIP_BLOCK: Mapping[str, str] = {
    **{"norm1": "layer_norm1", "norm2": "layer_norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2"},
    **{"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.out_proj"},
}
_VIT_BLOCK: Mapping[str, str] = {
    **{"norm1": "layernorm_before", "norm2": "layernorm_after", "fc1": "mlp.fc1", "fc2": "mlp.fc2"},
    **{"q": "attention.q_proj", "k": "attention.k_proj", "v": "attention.v_proj", "o": "attention.o_proj"},
}
_DINOV2_BLOCK: Mapping[str, str] = {
    **{"norm1": "norm1", "norm2": "norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2"},
    **{"q": "attention.q_proj", "k": "attention.k_proj", "v": "attention.v_proj", "o": "attention.o_proj"},
    **{"scale1": "layer_scale1.lambda1", "scale2": "layer_scale2.lambda1"},
}
# As transformers 5.17 still names it in DINOv2.
_OLD_ATTENTION: Mapping[str, str] = {
    **{"q": "attention.attention.query", "k": "attention.attention.key"},
    **{"v": "attention.attention.value", "o": "attention.output.dense"},
}


@dataclass(frozen=True, kw_only=True)
class PlainViT:
    """A ViT taken apart. `weights` has patch, cls, reg, pos, pre, post and `blocks.<i>.<name>` entries."""

    image_size: int
    patch_size: int
    num_heads: int
    eps: float
    activation: str
    weights: Mapping[str, Tensor] = field(repr=False)

    @property
    def depth(self) -> int:
        return 1 + max(int(name.split(".")[1]) for name in self.weights if name.startswith("blocks."))

    @property
    def width(self) -> int:
        return self.weights["patch.weight"].shape[0]

    @property
    def mlp_width(self) -> int:
        return self.weights["blocks.0.fc1.weight"].shape[0]

    @property
    def has_cls(self) -> bool:
        return "cls" in self.weights

    @property
    def num_registers(self) -> int:
        return self.weights["reg"].shape[-2] if "reg" in self.weights else 0

    @property
    def has_pre_norm(self) -> bool:
        return "pre.weight" in self.weights

    @property
    def has_scale(self) -> bool:
        return "blocks.0.scale1" in self.weights


def activation_of(mlp: nn.Module) -> str | None:
    """The transformers name of the one activation in an MLP; None for another one."""
    names = {type(child).__name__: child for child in mlp.modules()}
    found = [_ACTIVATIONS[name] for name in names if name in _ACTIVATIONS]
    gelu = names.get("GELU")
    if isinstance(gelu, nn.GELU) and gelu.approximate == "tanh":
        return "gelu_pytorch_tanh"
    return found[0] if len(found) == 1 else None


def take_timm_apart(
    state: Mapping[str, Tensor], *, image_size: int, num_heads: int, eps: float, activation: str
) -> PlainViT | None:
    """A timm `VisionTransformer`'s state in our names; None where a weight has no place in a plain ViT."""
    renamed = {
        **{"cls_token": "cls", "reg_token": "reg", "pos_embed": "pos"},
        **{"patch_embed.proj": "patch", "norm_pre": "pre", "norm": "post"},
    }
    ignored = ("head", "attn_pool.", "fc_norm.")
    return _take_apart(
        state,
        renamed,
        _TIMM_BLOCK,
        prefix="blocks.",
        packed=("attn.qkv.weight", "attn.qkv.bias"),
        ignored=ignored,
        image_size=image_size,
        num_heads=num_heads,
        eps=eps,
        activation=activation,
    )


def take_open_clip_apart(
    state: Mapping[str, Tensor], *, image_size: int, num_heads: int, eps: float, activation: str
) -> PlainViT | None:
    """An open_clip `VisionTransformer`'s state in our names; None where a weight has no place."""
    renamed = {
        **{"class_embedding": "cls", "positional_embedding": "pos"},
        **{"conv1": "patch", "ln_pre": "pre", "ln_post": "post"},
    }
    return _take_apart(
        state,
        renamed,
        _OPEN_CLIP_BLOCK,
        prefix="transformer.resblocks.",
        packed=("attn.in_proj_weight", "attn.in_proj_bias"),
        ignored=("proj", "attn_pool"),
        image_size=image_size,
        num_heads=num_heads,
        eps=eps,
        activation=activation,
    )


def _take_apart(
    state: Mapping[str, Tensor],
    renamed: Mapping[str, str],
    block: Mapping[str, str],
    *,
    prefix: str,
    packed: tuple[str, str],
    ignored: tuple[str, ...],
    image_size: int,
    num_heads: int,
    eps: float,
    activation: str,
) -> PlainViT | None:
    weights: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith(prefix):
            index, inner = name.removeprefix(prefix).split(".", 1)
            if inner in packed:
                kind = "weight" if inner.endswith("weight") else "bias"
                for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                    weights[f"blocks.{index}.{letter}.{kind}"] = part
                continue
            new = _rename(inner, block)
            new = None if new is None else f"blocks.{index}.{new}"
        elif name.startswith(ignored):
            continue
        else:
            new = _rename(name, renamed)
        if new is None:
            return None
        weights[new] = tensor
    if "patch.weight" not in weights or "pos" not in weights or "blocks.0.q.bias" not in weights:
        return None
    return PlainViT(
        image_size=image_size,
        patch_size=weights["patch.weight"].shape[-1],
        num_heads=num_heads,
        eps=eps,
        activation=activation,
        weights=weights,
    )


def _rename(name: str, table: Mapping[str, str]) -> str | None:
    if name in table:
        return table[name]
    stem, _, kind = name.rpartition(".")
    return f"{table[stem]}.{kind}" if stem in table and kind in ("weight", "bias") else None


def put_together(vit: PlainViT) -> PreTrainedModel | None:
    """The stock model of the same kind in fp32; None where no stock class has these parts."""
    key = (vit.has_cls, vit.has_pre_norm, vit.has_scale, vit.num_registers > 0)
    maker = {
        (False, False, False, False): _siglip,
        (True, True, False, False): _clip,
        (True, False, False, False): _vit,
        (True, False, True, False): _dinov2,
        (True, False, True, True): _dinov2,
    }.get(key)
    if maker is None:
        return None
    model, names = maker(vit)
    expected = model.state_dict()
    if set(names) - set(expected):
        return None
    # What has no source (a pooler, a mask token) is never read; zero keeps a saved model reproducible.
    filled = {name: names.get(name, torch.zeros_like(value)) for name, value in expected.items()}
    if any(filled[name].numel() != value.numel() for name, value in expected.items()):
        return None
    model.load_state_dict({name: filled[name].reshape(value.shape) for name, value in expected.items()})
    return model.eval()


def _sizes(vit: PlainViT) -> dict[str, int | float | str]:
    return {
        "hidden_size": vit.width,
        "intermediate_size": vit.mlp_width,
        "num_hidden_layers": vit.depth,
        "num_attention_heads": vit.num_heads,
        "image_size": vit.image_size,
        "patch_size": vit.patch_size,
        "hidden_act": vit.activation,
        "layer_norm_eps": vit.eps,
    }


def _named(vit: PlainViT, top: Mapping[str, str], block: Mapping[str, str], layers: str) -> dict[str, Tensor]:
    """`vit.weights` under stock names; `layers` is the path of the blocks."""
    names = {}
    for name, tensor in vit.weights.items():
        if name.startswith("blocks."):
            _, index, inner = name.split(".", 2)
            names[f"{layers}.{index}.{_rename(inner, block)}"] = tensor
        else:
            names[_rename(name, top) or name] = tensor
    return names


def _siglip(vit: PlainViT) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    config = SiglipVisionConfig.from_dict({**_sizes(vit), "vision_use_head": False})
    model = SiglipVisionModel(config)
    top = {
        **{"patch": "embeddings.patch_embedding", "post": "post_layernorm"},
        "pos": "embeddings.position_embedding.weight",
    }
    return model, _under(model, _named(vit, top, _CLIP_BLOCK, "encoder.layers"))


def _clip(vit: PlainViT) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    model = CLIPVisionModel(CLIPVisionConfig.from_dict(_sizes(vit)))
    top = {
        **{"patch": "embeddings.patch_embedding", "pre": "pre_layrnorm", "post": "post_layernorm"},
        **{"cls": "embeddings.class_embedding", "pos": "embeddings.position_embedding.weight"},
    }
    return model, _under(model, _named(vit, top, _CLIP_BLOCK, "encoder.layers"))


def _vit(vit: PlainViT) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    model = ViTModel(ViTConfig.from_dict(_sizes(vit)))
    top = {
        **{"patch": "embeddings.patch_embeddings.projection", "post": "layernorm"},
        **{"cls": "embeddings.cls_token", "pos": "embeddings.position_embeddings"},
    }
    return model, _named(vit, top, _VIT_BLOCK, "layers")


def _dinov2(vit: PlainViT) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    sizes = {**_sizes(vit), "mlp_ratio": vit.mlp_width // vit.width}
    model: PreTrainedModel
    if vit.num_registers:
        registers = Dinov2WithRegistersConfig.from_dict({**sizes, "num_register_tokens": vit.num_registers})
        model = Dinov2WithRegistersModel(registers)
    else:
        model = Dinov2Model(Dinov2Config.from_dict(sizes))
    top = {
        **{"patch": "embeddings.patch_embeddings.projection", "post": "layernorm"},
        **{"cls": "embeddings.cls_token", "pos": "embeddings.position_embeddings"},
        "reg": "embeddings.register_tokens",
    }
    is_old = any("attention.attention.query" in name for name in model.state_dict())
    block = {**_DINOV2_BLOCK, **_OLD_ATTENTION} if is_old else _DINOV2_BLOCK
    names = _named(vit, top, block, "encoder.layer")
    grid = vit.image_size // vit.patch_size
    pos_NE = names["embeddings.position_embeddings"].reshape(-1, vit.width)
    if len(pos_NE) == grid * grid:  # no position for the CLS token: a zero one
        pos_NE = torch.cat([pos_NE.new_zeros(1, vit.width), pos_NE])
    return model, {**names, "embeddings.position_embeddings": pos_NE}


def _under(model: PreTrainedModel, names: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names with the inner `vision_model.` that some versions of transformers put before them."""
    inner = any(name.startswith("vision_model.") for name in model.state_dict())
    return {f"vision_model.{name}": t for name, t in names.items()} if inner else names
