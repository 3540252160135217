"""Which records each rank reads at each optimiser step: a pure function of (seed, epoch, step, rank)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from llava_kd.data.batches.packing import Packing, RecordSizes, pack
from llava_kd.data.sources.mixture import permutation


def dealt(tokens: np.ndarray, *, rank: int, world_size: int, step: int) -> list[int]:
    """Which rows of a step, of so many tokens each, a rank reads: level in the step and over the steps.

    From the longest to the shortest the rows go to the ranks to and fro. Who begins moves on at each step by
    about the golden section of the ranks, so over any stretch of steps each rank has its share of long rows.
    """
    stride = round(world_size * (5**0.5 - 1) / 2)
    while math.gcd(stride, world_size) > 1:
        stride += 1
    turn = (rank + step * stride) % world_size
    rounds = np.argsort(-tokens, kind="stable").reshape(-1, world_size)
    return sorted(int(rows[turn if k % 2 == 0 else -1 - turn]) for k, rows in enumerate(rounds))


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """Rows of one epoch: row `r` holds `records[offsets[r]:offsets[r + 1]]` and, where known, `tokens[r]`."""

    records: np.ndarray
    offsets: np.ndarray
    tokens: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, r: int) -> tuple[int, ...]:
        return tuple(self.records[self.offsets[r] : self.offsets[r + 1]].tolist())


class Plan:
    """Rows of records, dealt to steps and ranks.

    The epochs follow each other without a seam: an epoch gives every record once, in its own order, and the
    last step of an epoch goes on into the next, so nothing is dropped or repeated, and every rank has the
    same number of rows at every step. Without `packing` a row is one record. With it the rows of a step,
    which do not depend on the number of ranks, are dealt to the ranks so that their tokens are level.
    """

    def __init__(
        self,
        *,
        num_records: int,
        seed: int,
        global_batch_size: int,
        world_size: int,
        packing: Packing | None = None,
        sizes: RecordSizes | None = None,
    ) -> None:
        if (packing is None) != (sizes is None):
            raise ValueError(
                "packing and the sizes of the records must be given together; got only one of them"
            )
        self._num_records = num_records
        self._seed = seed
        self._world_size = world_size
        self._packing = packing
        self._sizes = sizes
        self._epochs: dict[int, Epoch] = {}
        self._starts = [0]  # number of rows before each epoch that was planned
        self.rows_per_step = self._rows_per_step(global_batch_size)
        if self.rows_per_step % world_size:
            raise ValueError(
                f"the global batch ({self.rows_per_step} rows) must be a multiple of the number of ranks "
                f"({world_size})"
            )

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self._epoch(0)) // self.rows_per_step)

    def rows(self, step: int, rank: int) -> list[tuple[int, ...]]:
        """Record numbers of each of the rank's rows at an optimiser step."""
        first = step * self.rows_per_step
        mine = range(rank, self.rows_per_step, self._world_size)
        if self._packing is not None and self._world_size > 1:
            tokens = self._tokens(first, first + self.rows_per_step)
            mine = dealt(tokens, rank=rank, world_size=self._world_size, step=step)
        places = [self._locate(first + number) for number in mine]
        return [self._epoch(epoch).row(row) for epoch, row in places]

    def _locate(self, place: int) -> tuple[int, int]:
        """Epoch, and row in it, of a place in the run."""
        while place >= self._starts[-1]:
            last = len(self._starts) - 1
            self._starts.append(self._starts[-1] + len(self._epoch(last)))
        epoch = int(np.searchsorted(self._starts, place, side="right")) - 1
        return epoch, place - self._starts[epoch]

    def _tokens(self, first: int, stop: int) -> np.ndarray:
        """Tokens of each row from place `first` to `stop`."""
        parts = []
        while first < stop:
            epoch, row = self._locate(first)
            tokens = self._epoch(epoch).tokens
            assert tokens is not None  # packed epochs know them
            parts.append(tokens[row : row + stop - first])
            first += len(parts[-1])
        return np.concatenate(parts)

    def _epoch(self, epoch: int) -> Epoch:
        if epoch not in self._epochs:
            self._epochs = {e: kept for e, kept in self._epochs.items() if abs(e - epoch) == 1}
            self._epochs[epoch] = self._make(epoch)
        return self._epochs[epoch]

    def _make(self, epoch: int) -> Epoch:
        order = permutation(self._num_records, seed=self._seed, epoch=epoch)
        if self._packing is None or self._sizes is None:
            return Epoch(records=order, offsets=np.arange(self._num_records + 1))
        packs = pack(order, self._sizes, self._packing)
        packs = [packs[r] for r in permutation(len(packs), seed=self._seed, epoch=epoch, purpose=1).tolist()]
        offsets = np.cumsum([0, *(len(members) for members in packs)])
        records = np.array([i for members in packs for i in members])
        tokens = np.add.reduceat(self._sizes.tokens[records].astype(np.int64), offsets[:-1])
        return Epoch(records=records, offsets=offsets, tokens=tokens)

    def _rows_per_step(self, global_batch_size: int) -> int:
        if self._packing is None:
            return global_batch_size
        if self._packing.packs_per_step is not None:
            return self._packing.packs_per_step
        packs = global_batch_size * len(self._epoch(0)) / self._num_records
        return max(1, round(packs / self._world_size)) * self._world_size
