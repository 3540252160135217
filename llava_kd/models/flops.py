"""Floating-point operations of a LLaVA model, from its shapes.

A weight that meets a token is two operations; attention has two products more, of every token with every
token of its record, nothing halved because later tokens are hidden (PaLM, arXiv 2204.02311, appendix B). A
backward is the same again for the gradient of the inputs, where anything before is trained, and again for
that of the weights, where they are. Of experts, those that a token goes to are counted; a sliding window as
if it were none. Not counted: norms, activations, embeddings, scans of recurrent layers, what is computed
twice to save memory, and what a loss does beyond the head.

Shape legend: I images, C channels, H height, W width.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaForConditionalGeneration, PreTrainedConfig

from llava_kd.batch import Inputs
from llava_kd.models.towers.vision_tower import text_config

_PRODUCT = 2  # a multiplication and an addition
_WITHOUT_PAIRS = ("linear_attention", "mamba", "conv", "recurrent")


@dataclass(frozen=True, kw_only=True)
class Backward:
    """Which gradients a step needs: of weights, as a share of each part's, and of what goes in."""

    tower: float = 0.0
    projector: float = 0.0
    decoder: float = 0.0
    head: float = 0.0
    through_tower: bool = False
    through_decoder: bool = False

    @staticmethod
    def of(mllm_parameters: Mapping[str, nn.Parameter]) -> Backward:
        """From a stock model's parameters by name, as they are marked to train."""

        def share(prefix: str) -> float:
            own = [p for name, p in mllm_parameters.items() if name.startswith(prefix) and p.ndim > 1]
            return sum(p.numel() for p in own if p.requires_grad) / max(1, sum(p.numel() for p in own))

        tower, projector = share("model.vision_tower."), share("model.multi_modal_projector.")
        decoder, head = share("model.language_model.layers."), share("lm_head.")
        return Backward(
            tower=tower,
            projector=projector,
            decoder=decoder,
            head=head,
            through_tower=tower > 0,
            through_decoder=max(tower, projector, decoder) > 0,
        )


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Of one forward: of an image through the projector, a token, a pair of tokens of a record, a head row.

    `projector_inside`: of `projector`, what comes after its first layer.
    """

    projector: float
    projector_inside: float
    token: float
    pair: float
    row: float

    @staticmethod
    def of(stock: LlavaForConditionalGeneration) -> Flops:
        """From an empty copy of it, so that weights in few bits and adapters do not change the shapes."""
        with torch.device("meta"):
            empty = type(stock)(stock.config)
        text = text_config(stock.config)
        matrices = [
            parameter
            for module in empty.model.multi_modal_projector.modules()
            for parameter in module.parameters(recurse=False)
            if parameter.ndim > 1
        ]
        sizes = [_PRODUCT * matrix.numel() for matrix in matrices]
        layers = empty.model.language_model.layers
        return Flops(
            projector=float(sum(sizes)),
            projector_inside=float(sum(sizes[1:])),
            token=_PRODUCT * sum(_met(name, p, layers, text) for name, p in layers.named_parameters()),
            pair=_of_pair(text),
            row=float(_PRODUCT * empty.lm_head.weight.numel()),
        )

    def of_inputs(
        self, inputs: Inputs, *, head_rows: int, tower_image: float = 0.0, backward: Backward | None = None
    ) -> float:
        """Of one micro-batch. `tower_image`: what the tower costs an image, 0 where it is not run.

        `backward`: None for a model that only answers. Padding is counted, as it is computed.
        """
        back = backward or Backward()
        images, per_image = inputs.num_images, len(inputs.places.visual_N) / max(1, inputs.num_images)
        lengths = inputs.places.lengths
        tokens, pairs = sum(lengths), sum(length * length for length in lengths)
        into = float(back.through_decoder)
        projected = self.projector * (1 + back.projector)
        projected += self.projector if back.through_tower else self.projector_inside * (back.projector > 0)
        return (
            images * tower_image * (1 + back.tower + back.through_tower)
            + images * per_image * projected
            + tokens * self.token * (1 + into + back.decoder)
            + pairs * self.pair * (1 + 2 * into)
            + head_rows * self.row * (1 + into + back.head)
        )


def of_tower(tower: nn.Module, height: int, width: int) -> float:
    """Operations of a tower for one image, as PyTorch counts them while it runs one, where it is placed."""
    weight = next(tower.parameters())
    pixels_ICHW = torch.zeros(1, 3, height, width, device=weight.device, dtype=weight.dtype)
    modes = {module: module.training for module in tower.modules()}
    tower.eval()  # it neither draws nor counts anything
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tower(pixels_ICHW, output_hidden_states=True)
    for module, mode in modes.items():
        module.training = mode
    return float(counter.get_total_flops())


def _met(name: str, parameter: nn.Parameter, layers: nn.Module, text: PreTrainedConfig) -> float:
    """Elements of a matrix of a decoder layer that a token meets."""
    if parameter.ndim < 2:
        return 0.0
    if re.search(r"\bexperts\.", name) is None:
        return float(parameter.numel())
    chosen = getattr(text, "num_experts_per_tok", None) or getattr(text, "num_experts_per_token", None)
    kept = re.match(r"(.*\bexperts)\.\d+\.", name)  # a list of modules, not one matrix of all
    there = parameter.shape[0] if kept is None else len(list(layers.get_submodule(kept[1]).children()))
    return parameter.numel() * (1.0 if chosen is None else min(1.0, chosen / there))


def _of_pair(text: PreTrainedConfig) -> float:
    """Operations that two tokens of a record have with each other, in all layers: query with key, weight
    with value.
    """
    kinds = getattr(text, "layer_types", None) or ["attention"] * text.num_hidden_layers
    with_pairs = sum(not kind.startswith(_WITHOUT_PAIRS) for kind in kinds)
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    values = getattr(text, "v_head_dim", None) or width
    keys = getattr(text, "qk_head_dim", None) or width
    return float(_PRODUCT * with_pairs * heads * (keys + values))


def peak_of(device_name: str, peaks: Mapping[str, float]) -> float | None:
    """The entry of the longest name that `device_name` contains."""
    found = [name for name in peaks if name.lower() in device_name.lower()]
    return peaks[max(found, key=len)] if found else None


def head_rows(inputs: Inputs, places: Collection[str]) -> int:
    """Rows of a micro-batch that go through the head: `response`, `visual`."""
    found = inputs.places
    return len(found.response_N) * ("response" in places) + len(found.distilled_N) * ("visual" in places)
