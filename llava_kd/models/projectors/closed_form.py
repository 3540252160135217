"""A two-layer projector that begins as the linear map which best carries pictures to the words beside them.

Ridge regression of the words (mean embedding of the tokens of an answer) on the picture (mean feature of its
visual tokens), with the penalty that generalised cross-validation picks (Golub, Heath and Wahba 1979). The
two layers then are that map exactly: for GELU, SiLU and ReLU, a(x) - a(-x) = x, so a pair of hidden units
carries one direction, and a hidden width of H carries the H // 2 that matter most to the fitted pictures.

Shape legend: N pictures, E width of a feature, D width of an embedding, H hidden width, R directions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

PENALTIES = tuple(10.0**k for k in range(-6, 3))  # shares of the mean square of a standardised feature
FLAT = 1e-6  # of the largest deviation: a coordinate that varies less tells nothing


@dataclass(frozen=True, kw_only=True)
class LinearMap:
    """`feature @ weight_ED + bias_D`."""

    weight_ED: Tensor
    bias_D: Tensor

    def __call__(self, features_NE: Tensor) -> Tensor:
        return features_NE @ self.weight_ED + self.bias_D


@torch.no_grad()
def ridge(features_NE: Tensor, words_ND: Tensor) -> tuple[LinearMap, float]:
    """In fp64, the map of standardised features, and the share of the words' variance that it explains.

    The share is of pictures that are left out, one at a time, as cross-validation estimates it.
    """
    if len(features_NE) < 2:
        raise ValueError(f"a map needs at least two pictures with words; got {len(features_NE)}")
    X, Y = features_NE.double(), words_ND.double()
    mean_E, mean_D = X.mean(0), Y.mean(0)
    deviation_E = X.std(0)
    scale_E = torch.where(deviation_E > FLAT * deviation_E.max(), 1 / deviation_E.clamp_min(1e-300), 0.0)
    U, s, Vh = torch.linalg.svd((X - mean_E) * scale_E, full_matrices=False)
    centred_ND = Y - mean_D
    along = U.T @ centred_ND
    best: tuple[float, float] | None = None
    for penalty in PENALTIES:
        shrink = s**2 / (s**2 + penalty * len(X))
        left = (centred_ND - U @ (shrink[:, None] * along)).square().sum()
        free = 1 - float(shrink.sum() + 1) / len(X)  # the mean takes one as well
        error = float(left) / free**2 if free > 0 else float("inf")
        if best is None or error < best[0]:
            best = error, penalty
    assert best is not None
    error, penalty = best
    solved_ED = Vh.T @ ((s / (s**2 + penalty * len(X)))[:, None] * along)
    weight_ED = scale_E[:, None] * solved_ED
    total = float(centred_ND.square().sum())
    explained = 1 - error / total if total > 0 else 0.0
    return LinearMap(weight_ED=weight_ED, bias_D=mean_D - mean_E @ weight_ED), explained


@torch.no_grad()
def sized(found: LinearMap, tokens_NE: Tensor, root_mean_square: float) -> LinearMap:
    """The same directions, and what differs between tokens as large as an embedding is."""
    mean_D = found(tokens_NE.double().mean(0))
    apart = (found(tokens_NE.double()) - mean_D).square().mean().sqrt()
    factor = root_mean_square / apart.clamp_min(1e-12)
    weight_ED = found.weight_ED * factor
    return LinearMap(weight_ED=weight_ED, bias_D=mean_D - tokens_NE.double().mean(0) @ weight_ED)


@torch.no_grad()
def begin_as(projector: LlavaMultiModalProjector, found: LinearMap, features_NE: Tensor) -> float:
    """Set both layers of a stock projector to the map. Which share of its outputs' variance they carry.

    `features_NE` decide which directions matter where there are more than H // 2. Raises ValueError for a
    projector without biases, and for an activation that no pair of units makes linear.
    """
    first, second = projector.linear_1, projector.linear_2
    if first.bias is None or second.bias is None:
        raise ValueError("a projector without biases cannot start in closed form: it cannot hold the mean")
    x = torch.linspace(-4, 4, 33, dtype=first.weight.dtype)
    act = projector.act
    if not torch.allclose(act(x) - act(-x), x, atol=1e-4):
        raise ValueError(
            f"a projector with the activation {type(act).__name__} cannot start as a linear map: a(x) - "
            "a(-x) is not x; take gelu, silu or relu, or student.projector_start: random"
        )
    mean_E = features_NE.double().mean(0)
    outputs_ND = (features_NE.double() - mean_E) @ found.weight_ED
    _, size_R, directions_RD = torch.linalg.svd(outputs_ND, full_matrices=False)
    count = min(first.out_features // 2, int((size_R > FLAT * size_R[0]).sum()))
    kept_RD = directions_RD[:count]
    along_ER = found.weight_ED @ kept_RD.T
    deviation_R = (size_R[:count] / max(len(outputs_ND) - 1, 1) ** 0.5).clamp_min(1e-12)
    inner_RE = (along_ER / deviation_R).T
    offset_R = -(inner_RE @ mean_E)
    outer_DR = kept_RD.T * deviation_R
    at = 2 * count  # hidden units beyond stay as they were drawn, and begin by adding nothing
    first.weight[:at] = torch.cat([inner_RE, -inner_RE]).to(first.weight)
    first.bias[:at] = torch.cat([offset_R, -offset_R]).to(first.bias)
    second.weight.zero_()
    second.weight[:, :at] = torch.cat([outer_DR, -outer_DR], 1).to(second.weight)
    second.bias.copy_(found(mean_E))
    whole = float(size_R.square().sum())
    return float(size_R[:count].square().sum()) / whole if whole > 0 else 1.0
