"""A small SigLIP vision tower that has learnt to see: each patch names what its cell of the grid holds.

Shape legend: B pictures, C channels, H height, W width, N patches, D width of the tower, L labels of a patch
or, of directions, all their values.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from llava_kd.data.shapes.scenes import COLOURS, GRID, SHAPES, SIZES, Scene, draw, random_scene

IMAGE_SIZE = 48
PATCH_SIZE = 8
PATCHES_PER_SIDE = IMAGE_SIZE // PATCH_SIZE
# What a patch is asked for: is there a shape, its colour, its form, its size, and which cell this is.
LABEL_SIZES = (2, len(COLOURS), len(SHAPES), len(SIZES), GRID * GRID)
IGNORE = -100
SIZE_PENALTY = 0.5
TRAINED_LAYERS = (-2, -1)


def make_image_processor() -> SiglipImageProcessor:
    return SiglipImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})


def make_tower() -> SiglipVisionModel:
    """An untrained tower of the quickstart's size."""
    config = SiglipVisionConfig(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        vision_use_head=False,
    )
    return SiglipVisionModel(config)


@dataclass(frozen=True, kw_only=True)
class Labelled:
    pixels_BCHW: Tensor
    labels_BNL: Tensor


def labelled_pictures(num_pictures: int, *, seed: int) -> Labelled:
    """Pictures of random scenes with the labels of their patches."""
    rng = random.Random(f"tower {seed}")
    scenes = [random_scene(rng) for _ in range(num_pictures)]
    processor = make_image_processor()
    pictures = [draw(scene, rng) for scene in tqdm(scenes, desc="drawing for the tower", unit="image")]
    return Labelled(
        pixels_BCHW=_pixels(processor, pictures),
        labels_BNL=torch.tensor([_patch_labels(scene) for scene in scenes]),
    )


def _pixels(processor: SiglipImageProcessor, pictures: Sequence[Image.Image]) -> Tensor:
    chunks = [pictures[i : i + 500] for i in range(0, len(pictures), 500)]
    return torch.cat([processor(images=list(c), return_tensors="pt")["pixel_values"] for c in chunks])


def _patch_labels(scene: Scene) -> list[list[int]]:
    by_cell = {shape.cell: shape for shape in scene}
    labels = []
    for patch in range(PATCHES_PER_SIDE**2):
        row, column = divmod(patch, PATCHES_PER_SIDE)
        cell = row * GRID // PATCHES_PER_SIDE * GRID + column * GRID // PATCHES_PER_SIDE
        shape = by_cell.get(cell)
        if shape is None:
            labels.append([0, IGNORE, IGNORE, IGNORE, cell])
        else:
            colour, form, size = (
                COLOURS.index(shape.colour),
                SHAPES.index(shape.shape),
                SIZES.index(shape.size),
            )
            labels.append([1, colour, form, size, cell])
    return labels


def label_directions(width: int) -> Tensor:
    """Orthonormal directions, one for each value of each label; the features are read along them.

    A readout that learns finds a label in however small a part of the features. A fixed one makes the tower
    give every label as much of the features as any other, so that a projector soon finds all of them.
    """
    basis_DL, _ = torch.linalg.qr(torch.randn(width, sum(LABEL_SIZES)))
    return basis_DL


def _read(features_BND: Tensor, directions_DL: Tensor) -> list[Tensor]:
    """Logits of each label."""
    return list((features_BND @ directions_DL).split(LABEL_SIZES, dim=-1))


def train_tower(
    tower: SiglipVisionModel, data: Labelled, *, steps: int, batch_size: int, learning_rate: float, seed: int
) -> dict[int, Tensor]:
    """Teaches the last two layers, of which LLaVA reads one, to carry the labels; returns the directions."""
    directions = {layer: label_directions(tower.config.hidden_size) for layer in TRAINED_LAYERS}
    optimizer = torch.optim.AdamW(tower.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=max(steps, 2))
    generator = torch.Generator().manual_seed(seed)
    bar = tqdm(range(steps), desc="vision tower", unit="step")
    for _ in bar:
        rows = torch.randint(len(data.pixels_BCHW), (batch_size,), generator=generator)
        hidden = tower(data.pixels_BCHW[rows], output_hidden_states=True).hidden_states
        losses = [
            _loss(hidden[layer], directions_DL, data.labels_BNL[rows])
            for layer, directions_DL in directions.items()
        ]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return directions


@torch.no_grad()
def enlarge_features(tower: SiglipVisionModel, factor: float) -> None:
    """Multiplies all hidden states: a projector learns faster from features as large as those of real towers.

    Each layer reads a normalised stream and adds to it, so enlarging all that is added changes nothing else.
    """
    for name, parameter in tower.named_parameters():
        if any(part in name for part in ("embedding", "out_proj", "fc2")):
            parameter.mul_(factor)


def _loss(features_BND: Tensor, directions_DL: Tensor, labels_BNL: Tensor) -> Tensor:
    """Cross-entropy of all labels, and a price on the size of the features, worth paying for labels only."""
    losses = [
        F.cross_entropy(logits.flatten(0, 1), labels_BNL[..., i].flatten(), ignore_index=IGNORE)
        for i, logits in enumerate(_read(features_BND, directions_DL))
    ]
    return torch.stack(losses).sum() + SIZE_PENALTY * features_BND.square().mean()


@torch.no_grad()
def label_accuracy(
    tower: SiglipVisionModel, directions_DL: Tensor, data: Labelled, *, layer: int
) -> list[float]:
    """Share of patches read rightly from `layer`: occupied, colour, form, size, cell."""
    hidden_BND = tower(data.pixels_BCHW, output_hidden_states=True).hidden_states[layer]
    accuracies = []
    for i, logits in enumerate(_read(hidden_BND, directions_DL)):
        labels_BN = data.labels_BNL[..., i]
        asked_BN = labels_BN != IGNORE
        accuracies.append((logits.argmax(-1)[asked_BN] == labels_BN[asked_BN]).double().mean().item())
    return accuracies
