"""Memory that is written again as soon as nobody reads it any more.

A fresh block of some megabytes comes from the system page by page, each fetched and zeroed when it is first
touched: of the normalised pixels that costs several times what computing them does.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_SPARE = 8  # blocks that may lie idle; more were in use at once only for a while


class KeptPages:
    """float32 tensors on the CPU, for one thread to take; any thread may hold and drop them.

    A tensor's storage, and so every view of it and whatever autograd saved, holds the array that it was made
    of: an array that the list alone refers to is free.
    """

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []

    def take(self, shape: Sequence[int]) -> Tensor:
        """A contiguous tensor of `shape`, with anything in it."""
        size = math.prod(shape)
        is_free = [_references(self._arrays, i) == _BY_LIST for i in range(len(self._arrays))]
        busy = [array for array, free in zip(self._arrays, is_free, strict=True) if not free]
        idle = sorted((a for a, free in zip(self._arrays, is_free, strict=True) if free), key=len)
        place = next((i for i, array in enumerate(idle) if len(array) >= size), None)
        if place is None:
            idle = []  # too small: the next ones are rather as large as this one
            array = torch.empty(size, dtype=torch.float32).numpy()  # aligned as every tensor is
        else:
            array = idle.pop(place)
        self._arrays = [*busy, *idle[-_SPARE:], array]
        return torch.from_numpy(array)[:size].view(*shape)


def _references(arrays: list[np.ndarray], i: int) -> int:
    return sys.getrefcount(arrays[i])


_BY_LIST = _references([np.empty(0)], 0)  # what is counted where the list alone refers to an array
