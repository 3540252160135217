"""A tiny network from a picture and noise to the numbers of its change, and the ascent that moves it.

Shape legend: I images, C channels, H height, W width, S places seen, Z noise of an image, K numbers of its
change, P weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from llava_kd.distill.teaching.pictures.warps import NUMBERS

NOISE, HIDDEN, SIDE = 8, 32, 4  # the network sees a picture as SIDE x SIDE means of its channels
_SHAPES = ((HIDDEN, SIDE * SIDE + NOISE), (HIDDEN,), (NUMBERS, HIDDEN), (NUMBERS,))
_BETAS, _EPS = (0.9, 0.999), 1e-8


class Augmentor(nn.Module):
    """All that it learns and all that its Adam remembers are buffers: no engine's optimiser touches them."""

    weights_P: Tensor
    exp_avg_P: Tensor
    exp_avg_sq_P: Tensor
    updates: Tensor

    def __init__(self, *, lr: float, seed: int) -> None:
        super().__init__()
        self._lr = lr
        self.register_buffer("weights_P", _first_weights(seed))
        for name in ("exp_avg_P", "exp_avg_sq_P"):
            self.register_buffer(name, torch.zeros_like(self.weights_P))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    def leaf(self) -> Tensor:
        """The weights, as what a gradient is asked for."""
        return self.weights_P.detach().requires_grad_()

    def forward(self, pixels_ICHW: Tensor, noise_IZ: Tensor, weights_P: Tensor | None = None) -> Tensor:
        """[I, K], each within (-1, 1). `weights_P`: a `leaf`, or those that there are without gradient."""
        weights_P = self.weights_P if weights_P is None else weights_P
        parts = weights_P.split([torch.Size(shape).numel() for shape in _SHAPES])
        first, first_bias, last, last_bias = (p.view(s) for p, s in zip(parts, _SHAPES, strict=True))
        with torch.autocast(pixels_ICHW.device.type, enabled=False):
            grey_I1HW = pixels_ICHW.float().mean(1, keepdim=True)
            seen_IS = functional.adaptive_avg_pool2d(grey_I1HW, SIDE).flatten(1)
            seen_IS = torch.cat([seen_IS, noise_IZ.float()], 1)
            return functional.linear(
                functional.linear(seen_IS, first, first_bias).relu(), last, last_bias
            ).tanh()

    @torch.no_grad()
    def ascend(self, gradient_P: Tensor) -> None:
        """One update of Adam towards more of what this is the gradient of.

        Raises ValueError for a gradient that is not finite, before anything moved.
        """
        if not bool(torch.isfinite(gradient_P).all()):
            raise ValueError(
                "the gradient of the learned picture change is not finite; lower pictures.hard.lr or its "
                "ranges, or set teacher.dtype to float32"
            )
        self.updates += 1
        number = self.updates.double()
        self.exp_avg_P.lerp_(gradient_P, 1 - _BETAS[0])
        self.exp_avg_sq_P.lerp_(gradient_P * gradient_P, 1 - _BETAS[1])
        mean_P = self.exp_avg_P / (1 - _BETAS[0] ** number)
        square_P = self.exp_avg_sq_P / (1 - _BETAS[1] ** number)
        self.weights_P += self._lr * mean_P / (square_P.sqrt() + _EPS)


def _first_weights(seed: int) -> Tensor:
    """As a linear layer's, but the last ones small: the first changes are small, and differ by the noise."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [2 * torch.rand(shape, generator=generator) - 1 for shape in _SHAPES]
    bounds = [(SIDE * SIDE + NOISE) ** -0.5] * 2 + [HIDDEN**-0.5, 0.0]
    return torch.cat([bound * values.flatten() for bound, values in zip(bounds, drawn, strict=True)])


def next_phase(*, learns: bool, disagreement: float, lower: float, upper: float) -> bool:
    """Whether the augmentor learns next: until the models disagree by `upper`, and again from `lower` on."""
    return disagreement < upper if learns else disagreement <= lower
