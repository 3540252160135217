"""Hashes of weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def weights_fingerprint(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, types and values; the order of the names does not matter."""
    names = sorted(weights)
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter, and 14 GB take a while on one core
        hashes = pool.map(lambda name: _hash(weights[name]), names)
        lines = [
            f"{name} {tuple(weights[name].shape)} {value}" for name, value in zip(names, hashes, strict=True)
        ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _hash(tensor: Tensor) -> str:
    values = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(str(values.dtype).encode())
    digest.update(values.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
