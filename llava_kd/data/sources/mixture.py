"""Several sources as one, each with a weight, and the order that records are drawn in."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from llava_kd.data.sources.conversation import Record, Source


def permutation(num: int, *, seed: int, epoch: int, purpose: int = 0) -> np.ndarray:
    """Order of an epoch; the same with every version of numpy, since only raw random bits are drawn."""
    keys = np.random.Philox(key=[seed, 2 * epoch + purpose]).random_raw(num)
    return np.argsort(keys, kind="stable")


class Mixture:
    """Records of several sources. An epoch reads a source `weight` times.

    A share of a pass (0.3, or the rest of 1.3) is a fixed random part of the source, drawn from `seed`.
    `names` are what the sources are reported by; without them, each record by its own file. `templates` has
    of each source the name of its own template, if it has one.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float],
        *,
        names: Sequence[str] = (),
        templates: Sequence[str | None] = (),
        seed: int = 0,
    ) -> None:
        if len(sources) != len(weights) or not sources:
            raise ValueError(
                f"every source needs a weight, got {len(sources)} sources, {len(weights)} weights"
            )
        if any(weight <= 0 for weight in weights):
            raise ValueError(f"weights must be positive, got {list(weights)}; leave a source out instead")
        if names and (len(names) != len(sources) or len(set(names)) != len(names)):
            raise ValueError(f"every source needs a name of its own, got {list(names)}")
        if templates and len(templates) != len(sources):
            raise ValueError(f"every source needs a template or None, got {list(templates)}")
        self.names = tuple(names)
        self._templates = tuple(templates) if any(templates) else ()
        self._sources = tuple(sources)
        self._weights = tuple(weights)
        self._seed = seed
        members = []
        for number, (source, weight) in enumerate(zip(sources, weights, strict=True)):
            count = max(1, round(weight * len(source)))
            order = permutation(len(source), seed=seed, epoch=0, purpose=number)
            members.append(np.resize(order, count))
        self._ends = np.cumsum([len(numbers) for numbers in members])
        self._numbers = np.concatenate(members)

    def __len__(self) -> int:
        return len(self._numbers)

    def record(self, i: int) -> Record:
        part, number = self._find(i)
        record = self._sources[part].record(number)
        if self._templates and self._templates[part] is not None:
            return replace(record, template=self._templates[part])
        return record

    def image_bytes(self, i: int, k: int) -> bytes:
        part, number = self._find(i)
        return self._sources[part].image_bytes(number, k)

    def name_of(self, i: int) -> str:
        part, number = self._find(i)
        return self.names[part] if self.names else self._sources[part].name_of(number)

    @property
    def fingerprint(self) -> str:
        parts = [*(source.fingerprint for source in self._sources), repr((self._weights, self._seed))]
        if self._templates:
            parts.append(repr(self._templates))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def _find(self, i: int) -> tuple[int, int]:
        """Number of the source, and of the record in it."""
        return int(np.searchsorted(self._ends, i, side="right")), int(self._numbers[i])
