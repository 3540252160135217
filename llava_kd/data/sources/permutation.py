"""The order of records, drawn."""

from __future__ import annotations

import numpy as np


def permutation(num: int, *, seed: int, epoch: int, purpose: int = 0) -> np.ndarray:
    """Order of an epoch; the same with every version of numpy, since only raw random bits are drawn."""
    keys = np.random.Philox(key=[seed, 2 * epoch + purpose]).random_raw(num)
    return np.argsort(keys, kind="stable")
