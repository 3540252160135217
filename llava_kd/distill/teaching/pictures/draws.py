"""Chance that depends on the seed, the step and the records alone, and which record a place is of.

Shape legend: N flat places, R records, Z noise of a record.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from llava_kd.batch import Batch, Inputs


def generator_of(seed: int, step: int, *names: str) -> np.random.Generator:
    """The same for the same words, on every rank and in every process."""
    words = "\0".join((str(seed), str(step), *names)).encode(errors="surrogatepass")
    return np.random.default_rng(int.from_bytes(hashlib.sha256(words).digest()[:16], "big"))


def normal_of_records(batch: Batch, seed: int, step: int, width: int) -> Tensor:
    """[R, Z], of unit variance: of each record by its id, however records are cut into micro-batches."""
    check_ids(batch)
    drawn = [generator_of(seed, step, name).standard_normal(width) for name in batch.record_ids]
    noise_RZ = torch.from_numpy(np.stack(drawn)).float()
    return noise_RZ.to(batch.student.pixels_ICHW.device, non_blocking=True)


def check_ids(batch: Batch) -> None:
    """Raises ValueError for a batch whose records have no ids."""
    if not batch.record_ids:
        raise ValueError(
            "picture changes are drawn by record id, and this batch has no ids; fill in Batch.record_ids, "
            "one for each record in the order of the rows"
        )


def records_at(inputs: Inputs, places_N: Tensor) -> Tensor:
    """[N]: the number, among all records of the batch, of the one that each flat place is of."""
    boundaries = inputs.places.boundaries_N.long()
    is_record = inputs.segment_ids_BT.flatten()[boundaries[:-1]] > 0  # padding counts as none
    number = is_record.cumsum(0) - 1
    return number[torch.searchsorted(boundaries, places_N.contiguous(), right=True) - 1]


def records_of_images(inputs: Inputs) -> Tensor:
    """[I]: the number of the record of each image."""
    return records_at(inputs, inputs.places.visual_N.view(inputs.num_images, -1)[:, 0])
