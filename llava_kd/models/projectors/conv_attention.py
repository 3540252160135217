"""A connector whose visual tokens look at each other on their grid, as large as the two-layer one.

Between the two linear layers of stock LLaVA's projector stands what ClST (arXiv 2312.17446) is built of:
self-attention whose queries, keys and values are depthwise convolutions over the grid, and gates of each
place and of each channel, side by side. At first values are zero and the gates sum to one, so it begins as
the two layers alone. Stock LLaVA has no class for it; `from_pretrained` needs this file imported.

Shape legend: I images, N tokens of an image, R and C rows and columns of their grid, E tower width, W inner
width, D width of the language model, H heads, K width of a head, S width inside the channel gate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration

from llava_kd.models.towers.vision_tower import text_config, vision_config
from llava_kd.models.towers.visual_grid import VisualGrid

HEADS = 4
KERNEL = 3
_LEAST_GATE = 16  # the gate of channels is at least a sixteenth as wide as they


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Inner widths of a connector, and its parameters."""

    width: int
    gate: int
    parameters: int


def sizes(tower: int, language: int, parameters: int | None = None) -> Sizes:
    """The widest connector of at most so many parameters; by default those of the two-layer projector.

    The width is a multiple of the heads; what then is left goes to the gate of channels, so that less than
    one of its units is missing. Raises ValueError for models too narrow for any.
    """
    budget = language * (tower + language + 2) if parameters is None else parameters
    width = HEADS
    while _count(tower, language, width + HEADS, _least(width + HEADS)) <= budget:
        width += HEADS
    gate = _least(width)
    left = budget - _count(tower, language, width, gate)
    if left < 0:
        raise ValueError(
            f"`student.projector` is conv_attention, but a tower {tower} wide and a language model "
            f"{language} wide leave {budget:,} parameters, fewer than its smallest has; set projector to own"
        )
    gate += left // (2 * width + 1)
    return Sizes(width=width, gate=gate, parameters=_count(tower, language, width, gate))


def _least(width: int) -> int:
    return math.ceil(width / _LEAST_GATE)


def _count(tower: int, language: int, width: int, gate: int) -> int:
    linear = width * (tower + 1) + language * (width + 1)
    around = 2 * width + 3 * width * KERNEL**2 + 2 * KERNEL**2 + 1
    return linear + around + gate * (width + 1) + width * (gate + 1)


class ConvAttentionConfig(LlavaConfig):
    """A LLaVA with such a connector over a grid of `projector_rows` x `projector_columns` tokens."""

    model_type = "llava_kd_conv_attention"

    projector_width: int = 64
    projector_gate_width: int = 4
    projector_rows: int = 24
    projector_columns: int = 24


def check_grid(config: LlavaConfig, grid: VisualGrid, name: str) -> None:
    """ValueError where a checkpoint's connector is for other tokens than its tower and processor give."""
    if not isinstance(config, ConvAttentionConfig):
        return
    own = VisualGrid(rows=config.projector_rows, columns=config.projector_columns)
    if own != grid:
        raise ValueError(
            f"{name} has a connector for {own}, but its tower and processor give {grid}; restore the image "
            "size and the strategy that it was trained with"
        )


class ConvAttention(nn.Module):
    """[I, N, E] to [I, N, D]; each image by itself."""

    def __init__(self, config: ConvAttentionConfig) -> None:
        super().__init__()
        width, gate = config.projector_width, config.projector_gate_width
        self.grid = config.projector_rows, config.projector_columns
        self.linear_1 = nn.Linear(vision_config(config).hidden_size, width)
        self.act = nn.GELU()
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value = (_depthwise(width) for _ in range(3))
        self.place_gate = nn.Conv2d(2, 1, KERNEL, padding=KERNEL // 2)
        self.channel_gate = nn.Sequential(nn.Linear(width, gate), nn.GELU(), nn.Linear(gate, width))
        self.linear_2 = nn.Linear(width, text_config(config).hidden_size)

    @torch.no_grad()
    def draw(self, generator: torch.Generator, std: float) -> None:
        """Weights as a new connector has them: as the two linear layers, drawn with this deviation."""
        for name, parameter in self.named_parameters():
            if name in ("linear_1.weight", "linear_2.weight", "channel_gate.0.weight"):
                nn.init.normal_(parameter, std=std, generator=generator)
            elif name in ("query.weight", "key.weight"):
                nn.init.uniform_(parameter, -1 / KERNEL, 1 / KERNEL, generator=generator)
            else:
                nn.init.constant_(parameter, float(name == "norm.weight"))

    def forward(self, features_INE: Tensor) -> Tensor:
        rows, columns = self._grid_of(features_INE)
        inner_INW = self.act(self.linear_1(features_INE))
        map_IWRC = self.norm(inner_INW).transpose(1, 2).unflatten(2, (rows, columns))
        query_IHNK, key_IHNK, value_IHNK = (
            _per_head(layer(map_IWRC)) for layer in (self.query, self.key, self.value)
        )
        mixed_IHNK = nn.functional.scaled_dot_product_attention(query_IHNK, key_IHNK, value_IHNK)
        inner_INW = inner_INW + mixed_IHNK.transpose(1, 2).flatten(2)
        return self.linear_2(inner_INW * self._gates(inner_INW, rows, columns))

    def _gates(self, inner_INW: Tensor, rows: int, columns: int) -> Tensor:
        """Of places, from the mean and the largest channel there, plus of channels, from their means."""
        told_I2N = torch.stack([inner_INW.mean(2), inner_INW.amax(2)], dim=1)
        place_IN1 = self.place_gate(told_I2N.unflatten(2, (rows, columns))).flatten(2).transpose(1, 2)
        channel_I1W = self.channel_gate(inner_INW.mean(1, keepdim=True))
        return place_IN1.sigmoid() + channel_I1W.sigmoid()

    def _grid_of(self, features_INE: Tensor) -> tuple[int, int]:
        """One token alone is the stand-in of a batch without images, which engines wait for."""
        tokens, (rows, columns) = features_INE.shape[1], self.grid
        if tokens == rows * columns:
            return self.grid
        if tokens == 1:
            return 1, 1
        raise ValueError(
            f"this connector reads {rows} x {columns} = {rows * columns} visual tokens an image; got "
            f"{tokens}: the tower, its layer or the size of its images differs from what it was made for"
        )


def _depthwise(width: int) -> nn.Conv2d:
    return nn.Conv2d(width, width, KERNEL, padding=KERNEL // 2, groups=width, bias=False)


def _per_head(map_IWRC: Tensor) -> Tensor:
    """[I, H, N, K]: head h has the channels from h * K on."""
    return map_IWRC.flatten(2).unflatten(1, (HEADS, -1)).transpose(2, 3)


class ConvAttentionLlava(LlavaForConditionalGeneration):
    """A stock LLaVA in all but the connector."""

    config_class = ConvAttentionConfig

    def __init__(self, config: ConvAttentionConfig) -> None:
        super().__init__(config)
        self.model.multi_modal_projector = ConvAttention(config)  # pyright: ignore[reportAttributeAccessIssue]
        self.post_init()


AutoConfig.register(ConvAttentionConfig.model_type, ConvAttentionConfig)
AutoModelForImageTextToText.register(ConvAttentionConfig, ConvAttentionLlava)
