"""A connector of another layout as the projector of a stock LLaVA: two layers with an activation between.

A single linear layer is the first of the two, with no activation and the identity behind it: the same
function, bit for bit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration
from transformers.activations import ACT2FN

from llava_kd.models.files.convert.weights import load_exactly
from llava_kd.models.towers.vision_tower import text_config

_TWO_LAYERS = {"0.weight", "0.bias", "2.weight", "2.bias"}
_ONE_LAYER = {"weight", "bias"}
# Decoders that scaled whatever they were given by the root of their width, words and visual features alike,
# until transformers 5; since then it is words alone.
_SCALED_FEATURES = ("gemma",)


def put_projector(
    stock: LlavaForConditionalGeneration, state: Mapping[str, Tensor], kind: str | None, source: Path
) -> None:
    """Load the connector; `kind` is the name that its config has for it, if any.

    Raises ValueError, by the name of the kind, for one that is not one or two linear layers.
    """
    _refuse_other_kinds(set(state), kind, source)
    if set(state) != _ONE_LAYER and kind != "mlp1x_gelu":
        renamed = {
            f"{'linear_2' if name.startswith('2.') else 'linear_1'}.{name.rpartition('.')[2]}": tensor
            for name, tensor in state.items()
        }
    else:
        width = text_config(stock.config).hidden_size
        renamed = {f"linear_1.{name.rpartition('.')[2]}": tensor for name, tensor in state.items()}
        renamed |= {"linear_2.weight": torch.eye(width), "linear_2.bias": torch.zeros(width)}
        stock.config.projector_hidden_act = "linear"
        stock.model.multi_modal_projector.register_module("act", ACT2FN["linear"])
    load_exactly(stock.model.multi_modal_projector, renamed, f"{source}: the connector")


@torch.no_grad()
def scale_as_before(stock: LlavaForConditionalGeneration, version: object) -> None:
    """Give the projector the scale that the decoder of transformers `version` put on visual features."""
    text = text_config(stock.config)
    if text.model_type not in _SCALED_FEATURES or int(str(version or 4).partition(".")[0]) >= 5:
        return
    last = stock.model.multi_modal_projector.linear_2
    assert isinstance(last, nn.Linear)
    for parameter in last.parameters():
        parameter.mul_(math.sqrt(text.hidden_size))


def _refuse_other_kinds(names: set[str], kind: str | None, source: Path) -> None:
    layers = {int(number) for name in names if (number := name.partition(".")[0]).isdigit()}
    seen = kind
    if any(name.startswith(("clip.", "dinov2.")) for name in names):
        seen = "mof_mlp"
    elif "latents" in names:
        seen = "resampler"
    elif "query_tokens" in names or any(name.startswith("bert.") for name in names):
        seen = "qformer"
    elif layers and max(layers) > 2:
        seen = kind if re.fullmatch(r"mlp\d+x_gelu", kind or "") else f"mlp{max(layers) // 2 + 1}x_gelu"
    elif not names:
        seen = kind or "identity"
    elif _ONE_LAYER & names:
        if kind in (None, "linear"):
            return
    elif names <= _TWO_LAYERS and kind in (None, "mlp1x_gelu", "mlp2x_gelu"):
        return
    raise ValueError(
        f"{source} has the connector {seen or sorted(names)[0]!r}; stock LLaVA supports only `linear` and "
        "`mlp2x_gelu`; take a checkpoint with one of these"
    )
