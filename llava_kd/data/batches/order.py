"""What a loader is told: which records stand in which batch, and how they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_kd.data.batches.packing import Packing
from llava_kd.data.pixels.device_decode import Decoder
from llava_kd.data.pixels.images import MAX_PIXELS
from llava_kd.data.text.stretches import Spellers


@dataclass(frozen=True, kw_only=True)
class Order:
    """Which records stand in which micro-batch of which rank: nothing else decides it.

    With `packing` a row holds several records, and `micro_batch_size` counts rows; `one_record_per_row` lays
    the same records out unpacked, as the oracle of the packed layout. `records`, on one rank: these once, in
    this order.
    """

    seed: int
    global_batch_size: int
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1
    packing: Packing | None = None
    one_record_per_row: bool = False
    records: Sequence[int] | None = None


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How records are read; what is in a batch does not depend on it.

    `image_cache_bytes`: memory for resized images, in each worker, for data that come again. `cache`: where
    the lengths of records are kept for the next run that packs them. `spellers`, of student and teacher:
    their tokenizers differ, and their answers are matched as text.
    """

    num_workers: int = 0
    max_bad_rate: float = 0.001
    bad_records_path: str | Path | None = None
    max_pixels: int = MAX_PIXELS
    decoder: Decoder = "cpu"
    image_cache_bytes: int = 0
    cache: str | Path | None = None
    progress: bool = False
    spellers: Spellers | None = None
