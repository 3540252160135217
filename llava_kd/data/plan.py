"""Which records each rank reads at each optimiser step: a pure function of (seed, epoch, step, rank)."""

from __future__ import annotations

import numpy as np


def permutation(num_records: int, *, seed: int, epoch: int) -> np.ndarray:
    """Order of the records in an epoch; the same with every version of numpy."""
    keys = np.random.Philox(key=[seed, epoch]).random_raw(num_records)
    return np.argsort(keys, kind="stable")


class Plan:
    """Rows of records, dealt to steps and ranks.

    The epochs follow each other without a seam: an epoch gives every record once, in its own order, and the
    last step of an epoch goes on into the next, so nothing is dropped or repeated.
    """

    def __init__(self, *, num_records: int, seed: int, rows_per_step: int, world_size: int) -> None:
        if rows_per_step % world_size:
            raise ValueError(
                f"the global batch ({rows_per_step}) must be a multiple of the number of ranks ({world_size})"
            )
        self._num_records = num_records
        self._seed = seed
        self._rows_per_step = rows_per_step
        self._world_size = world_size
        self._orders: dict[int, np.ndarray] = {}

    @property
    def steps_per_epoch(self) -> int:
        return -(-self._num_records // self._rows_per_step)

    def rows(self, step: int, rank: int) -> list[tuple[int, ...]]:
        """Record numbers of each of the rank's rows at an optimiser step."""
        first = step * self._rows_per_step
        places = range(first + rank, first + self._rows_per_step, self._world_size)
        return [self._row(place) for place in places]

    def _row(self, place: int) -> tuple[int, ...]:
        epoch, i = divmod(place, self._num_records)
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = permutation(self._num_records, seed=self._seed, epoch=epoch)
        return (int(self._orders[epoch][i]),)
