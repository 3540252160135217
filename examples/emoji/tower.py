"""The backbone of the ONNX file as a folder of transformers' Dinov2Model, for `student.vision_tower`.

python examples/emoji/tower.py ONNX OUT --size 84

Its position embeddings are brought to the size once, by the model's own interpolation, and kept so: the
folder reads pictures of that size alone, and gives what the whole model gives there.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from onnx_weights import named_weights, read_onnx
from torch import nn
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

PREFIX = "backbone."
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's, as the package of the file has them
_HEAD = 64  # numbers of a head, in every DINOv2
# Attention's parts have other names in transformers 5.2x than in the version that the file was exported from.
_RENAMED = (
    ("attention.attention.query.", "attention.q_proj."),
    ("attention.attention.key.", "attention.k_proj."),
    ("attention.attention.value.", "attention.v_proj."),
    ("attention.output.dense.", "attention.o_proj."),
)


def _positions(tensors: Mapping[str, np.ndarray], width: int) -> np.ndarray:
    """[1, 1 + N, D]: the class token's and the patches', which an export keeps apart and without names."""
    spare = {name: t for name, t in tensors.items() if name.startswith("onnx::") and t.ndim == 3}
    first = [t for t in spare.values() if t.shape == (1, 1, width)]
    rest = [
        t
        for t in spare.values()
        if t.shape[0] == 1 and t.shape[2] == width and math.isqrt(t.shape[1]) ** 2 == t.shape[1] > 1
    ]
    if len(first) != 1 or len(rest) != 1:
        raise ValueError(
            f"the ONNX file must hold one position embedding of the class token and one of the patches; it "
            f"holds {len(first)} and {len(rest)}"
        )
    return np.concatenate([first[0], rest[0]], 1)


def read_tower(path: Path) -> Dinov2Model:
    """The backbone at the size it was trained for. Raises ValueError for a file of another model."""
    tensors, nodes = read_onnx(path)
    found = {
        name.removeprefix(PREFIX): torch.from_numpy(value)
        for name, value in named_weights(tensors, nodes).items()
        if name.startswith(PREFIX)
    }
    if "embeddings.patch_embeddings.projection.weight" not in found:
        raise ValueError(f"{path} has no backbone of DINOv2: no {PREFIX}embeddings.patch_embeddings")
    width, _, patch, _ = found["embeddings.patch_embeddings.projection.weight"].shape
    layers = {int(name.split(".")[2]) for name in found if name.startswith("encoder.layer.")}
    positions = torch.from_numpy(_positions(tensors, width))
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=len(layers),
        num_attention_heads=max(1, width // _HEAD),
        mlp_ratio=found["encoder.layer.0.mlp.fc1.bias"].shape[0] // width,
        patch_size=patch,
        image_size=patch * math.isqrt(positions.shape[1] - 1),
    )
    model = Dinov2Model(config).eval()
    wanted = model.state_dict()
    if "encoder.layer.0.attention.q_proj.weight" in wanted:
        for old, new in _RENAMED:
            found = {name.replace(old, new): value for name, value in found.items()}
    found["embeddings.position_embeddings"] = positions
    found["embeddings.mask_token"] = torch.zeros(1, width)  # of training alone; no export keeps it
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or extra:
        raise ValueError(f"{path} is another model: missing {missing[:3]}, unknown {extra[:3]}")
    model.load_state_dict(found)
    return model


@torch.no_grad()
def resized(model: Dinov2Model, size: int) -> Dinov2Model:
    """The model with position embeddings for pictures of `size` pixels alone."""
    patch = model.config.patch_size
    assert isinstance(patch, int)
    if size % patch:
        raise ValueError(f"the size must be a multiple of the patch, {patch}; got {size}")
    embeddings = model.embeddings
    tokens = torch.zeros(1, 1 + (size // patch) ** 2, model.config.hidden_size)
    positions = embeddings.interpolate_pos_encoding(tokens, size, size).clone()
    embeddings.position_embeddings = nn.Parameter(positions)
    model.config.image_size = size
    embeddings.patch_embeddings.image_size = (size, size)
    return model


def write_tower(model: Dinov2Model, out: Path) -> None:
    size = model.config.image_size
    assert isinstance(size, int)
    scratch = out.with_name(f".{out.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    model.save_pretrained(scratch)
    processor = BitImageProcessor(
        size={"height": size, "width": size},
        do_center_crop=False,
        image_mean=MEAN,
        image_std=STD,
        resample=3,
    )
    processor.save_pretrained(scratch)
    shutil.rmtree(out, ignore_errors=True)
    scratch.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("onnx", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, default=84)
    arguments = parser.parse_args()
    try:
        write_tower(resized(read_tower(arguments.onnx), arguments.size), arguments.out)
    except ValueError as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
