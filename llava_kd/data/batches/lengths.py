"""Exact token counts of every record, computed once and kept under the hash of source and tokens."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from llava_kd.bar import Bar
from llava_kd.data.batches.model_side import Side
from llava_kd.data.batches.packing import RecordSizes
from llava_kd.data.sources.cache import build_once, default_cache
from llava_kd.data.sources.conversation import Source

_CACHED_FROM_RECORDS = 20_000
_BATCH = 1000
_LAYOUT = 2
_FILE = "lengths.npy"


def record_sizes(
    source: Source,
    sides: tuple[Side, ...],
    *,
    cache: str | Path | None = None,
    progress: bool = False,
) -> RecordSizes:
    """Places that each record takes, on the side where it takes more, and its number of images.

    A record that turns out bad takes no more places than this.
    """
    if cache is None and len(source) < _CACHED_FROM_RECORDS:
        table = _compute(source, sides, progress)
        return RecordSizes(tokens=table[0], images=table[1])
    parts = (source.fingerprint, *(side.text_fingerprint for side in sides))
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    folder = Path(cache or default_cache()) / f"lengths{_LAYOUT}-{key}"
    build_once(folder, lambda scratch: np.save(scratch / _FILE, _compute(source, sides, progress)))
    table = np.load(folder / _FILE)
    return RecordSizes(tokens=table[0], images=table[1])


def _compute(source: Source, sides: tuple[Side, ...], progress: bool) -> np.ndarray:
    """[2, records]: places and images."""
    table = np.zeros((2, len(source)), dtype=np.int32)
    encoders = [side.encoder() for side in sides]
    with Bar(len(source), "token lengths", "records", is_shown=progress) as bar:
        for start in range(0, len(source), _BATCH):
            records = [source.record(i) for i in range(start, min(start + _BATCH, len(source)))]
            places = np.max([encoder.lengths(records) for encoder in encoders], axis=0)
            table[0, start : start + len(records)] = places
            table[1, start : start + len(records)] = [len(record.images) for record in records]
            bar.advance(len(records))
    return table
