"""A plan that reads given records once."""

from __future__ import annotations

from collections.abc import Sequence


class Listing:
    """These records once, in this order, one a row, all by one rank."""

    def __init__(self, records: Sequence[int], *, rows_per_step: int) -> None:
        self._records = records
        self.rows_per_step = rows_per_step

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self._records) // self.rows_per_step)

    def rows(self, step: int, rank: int) -> list[tuple[int, ...]]:
        """Record numbers of the rows of a step; the last may have fewer than the others."""
        del rank
        first = step * self.rows_per_step
        return [(i,) for i in self._records[first : first + self.rows_per_step]]
