"""Which rows a chunk of the head loss reads, and how many.

Shape legend: N rows, C rows of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_kd.losses.divergence import Divergence, Temperature

CUDA_TILE_ROWS = 128
CUDA_MEMORY_SHARE = 1 / 16
MAX_CHUNK_ROWS = 4224  # 33 tiles: with 1024 columns of dX, a tile for each of an H200's 132 multiprocessors
CPU_TILE_ROWS = 8
CPU_CHUNK_BYTES = 240 * 2**20  # of logits: each chunk reads both heads anew, and the head's gradient twice


@dataclass(frozen=True, kw_only=True)
class HeadRows:
    """What is asked of the rows. `active_rows`: how many have a KL weight, and another alone."""

    targets_N: Tensor
    ce_weight_N: Tensor
    kl_weight_N: Tensor | None
    temperature: Temperature
    divergence: Divergence
    num_common: int
    chunk_rows: int | None
    active_rows: tuple[int, int] | None

    def masks(self) -> tuple[Tensor, Tensor]:
        """Rows with a KL weight, and rows with a cross-entropy weight alone."""
        if self.kl_weight_N is None:
            return torch.zeros_like(self.ce_weight_N, dtype=torch.bool), self.ce_weight_N != 0
        has_kl_N = self.kl_weight_N != 0
        return has_kl_N, (self.ce_weight_N != 0) & ~has_kl_N

    def stated_counts_hold(self) -> Tensor:
        """Whether `active_rows` is right, or absent; a scalar on the device."""
        if self.active_rows is None:
            return torch.ones((), dtype=torch.bool, device=self.ce_weight_N.device)
        holds = [mask_N.sum() == size for mask_N, size in zip(self.masks(), self.active_rows, strict=True)]
        return torch.stack(holds).all()

    def chunks(self, *, bytes_per_row: int) -> Iterator[tuple[Tensor, bool]]:
        """Indices of the rows of each chunk, and whether they have KL weights."""
        for which, (mask_N, has_kl) in enumerate(zip(self.masks(), (True, False), strict=True)):
            if self.active_rows is None:
                index = mask_N.nonzero().squeeze(1)
            else:
                size = self.active_rows[which]
                index = torch.nonzero_static(mask_N, size=size, fill_value=0).squeeze(1)
            if len(index):
                rows = self.chunk_rows
                if rows is None:
                    rows = chunk_size(len(index), bytes_per_row=bytes_per_row, device=index.device)
                yield from ((index_C, has_kl) for index_C in index.split(rows))


def chunk_size(num_rows: int, *, bytes_per_row: int, device: torch.device) -> int:
    """Rows of a chunk: what memory allows, at most what fills the device, in chunks of equal size.

    A function of sizes and of the device's total memory, never of what is free at the moment.
    """
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory * CUDA_MEMORY_SHARE
        tile = CUDA_TILE_ROWS
    else:
        memory, tile = CPU_CHUNK_BYTES, CPU_TILE_ROWS
    most = max(tile, min(MAX_CHUNK_ROWS, int(memory / bytes_per_row)) // tile * tile)
    num_chunks = math.ceil(num_rows / most)
    return math.ceil(num_rows / num_chunks / tile) * tile
