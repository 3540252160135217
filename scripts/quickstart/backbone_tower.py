"""A small SigLIP vision tower that has learnt to see: each patch names what it shows.

Shape legend: B pictures, C channels, H height, W width, N patches, D width of the tower, V values of a label,
L labels of a patch or, of directions, all their values.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from backbone_labels import IGNORE
from backbone_settings import BackboneSetting, TowerSize
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

SIZE_PENALTY = 0.5  # a price on the size of the features, worth paying for labels only
TRAINED_LAYERS = (-2, -1)


def make_image_processor(size: TowerSize) -> SiglipImageProcessor:
    return SiglipImageProcessor(size={"height": size.image_size, "width": size.image_size})


def make_tower(size: TowerSize) -> SiglipVisionModel:
    """An untrained tower."""
    config = SiglipVisionConfig(
        hidden_size=size.width,
        intermediate_size=size.mlp_width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        image_size=size.image_size,
        patch_size=size.patch_size,
        vision_use_head=False,
    )
    return SiglipVisionModel(config)


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """`label_sizes` are how many values each label has."""

    pixels_BCHW: Tensor
    labels_BNL: Tensor
    label_sizes: tuple[int, ...]


def labelled_pictures(setting: BackboneSetting, num_pictures: int, *, seed: int) -> Labelled:
    """Pictures of random training scenes with the labels of their patches."""
    rng = random.Random(f"tower {seed}")
    split, per_side = setting.shapes.splits["train"], setting.tower.patches_per_side
    scenes = [split.scene(rng) for _ in range(num_pictures)]
    processor = make_image_processor(setting.tower)
    pictures = [split.draw(scene, rng) for scene in tqdm(scenes, desc="drawing for the tower", unit="image")]
    return Labelled(
        pixels_BCHW=_pixels(processor, pictures),
        labels_BNL=torch.tensor([setting.patch_labels(scene, per_side) for scene in scenes]),
        label_sizes=tuple(setting.labels.values()),
    )


def _pixels(processor: SiglipImageProcessor, pictures: Sequence[Image.Image]) -> Tensor:
    chunks = [pictures[i : i + 500] for i in range(0, len(pictures), 500)]
    return torch.cat([processor(images=list(c), return_tensors="pt")["pixel_values"] for c in chunks])


def label_directions(width: int, label_sizes: Sequence[int]) -> Tensor:
    """Orthonormal directions, one for each value of each label; the features are read along them.

    A readout that learns finds a label in however small a part of the features. A fixed one makes the tower
    give every label as much of the features as any other, so that a projector soon finds all of them.
    """
    basis_DL, _ = torch.linalg.qr(torch.randn(width, sum(label_sizes)))
    return basis_DL


def _read(features_BND: Tensor, directions_DL: Tensor, label_sizes: Sequence[int]) -> list[Tensor]:
    """Logits of each label."""
    return list((features_BND @ directions_DL).split(list(label_sizes), dim=-1))


def train_tower(
    tower: SiglipVisionModel, data: Labelled, *, steps: int, batch_size: int, learning_rate: float, seed: int
) -> dict[int, Tensor]:
    """Teaches the last two layers, of which LLaVA reads one, to carry the labels; returns the directions."""
    width, label_sizes = tower.config.hidden_size, data.label_sizes
    directions = {layer: label_directions(width, label_sizes) for layer in TRAINED_LAYERS}
    optimizer = torch.optim.AdamW(tower.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=max(steps, 2))
    generator = torch.Generator().manual_seed(seed)
    bar = tqdm(range(steps), desc="vision tower", unit="step")
    for _ in bar:
        rows = torch.randint(len(data.pixels_BCHW), (batch_size,), generator=generator)
        hidden = tower(data.pixels_BCHW[rows], output_hidden_states=True).hidden_states
        losses = [
            _loss(_read(hidden[layer], directions_DL, label_sizes), data.labels_BNL[rows])
            + SIZE_PENALTY * hidden[layer].square().mean()
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


def _loss(logits_of_labels: Sequence[Tensor], labels_BNL: Tensor) -> Tensor:
    """Cross-entropy, the sum over the labels."""
    losses = [
        F.cross_entropy(logits_BNV.flatten(0, 1), labels_BNL[..., i].flatten(), ignore_index=IGNORE)
        for i, logits_BNV in enumerate(logits_of_labels)
    ]
    return torch.stack(losses).sum()


@torch.no_grad()
def label_accuracy(
    tower: SiglipVisionModel, directions_DL: Tensor, data: Labelled, *, layer: int
) -> list[float]:
    """Share of patches that are read rightly from `layer`, label by label."""
    hidden_BND = tower(data.pixels_BCHW, output_hidden_states=True).hidden_states[layer]
    accuracies = []
    for i, logits_BNV in enumerate(_read(hidden_BND, directions_DL, data.label_sizes)):
        labels_BN = data.labels_BNL[..., i]
        asked_BN = labels_BN != IGNORE
        accuracies.append((logits_BNV.argmax(-1)[asked_BN] == labels_BN[asked_BN]).double().mean().item())
    return accuracies
