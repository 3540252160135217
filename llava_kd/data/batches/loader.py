"""Records in, micro-batches on the device out, in an order that only the seed sets.

A bad record (unreadable image, text that cannot be encoded) keeps its place: its labels are off, its images
are grey and not valid, it is counted, and it is named in a file. `BadRecords` says when the run stops.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from llava_kd.batch import Batch
from llava_kd.data.batches.bad_records import BadRecords
from llava_kd.data.batches.device_stage import Ahead
from llava_kd.data.batches.lengths import record_sizes
from llava_kd.data.batches.listed_plan import Listing
from llava_kd.data.batches.micro_batches import Micro, MicroBatches
from llava_kd.data.batches.model_side import AnySide, Side
from llava_kd.data.batches.order import Order, Reading
from llava_kd.data.batches.packing import Packing, RecordSizes
from llava_kd.data.batches.plan import Plan
from llava_kd.data.batches.worker_processes import Guarded, Refusal, end_with_parent, worker_context
from llava_kd.data.pixels.device_decode import check_decoder
from llava_kd.data.sources.conversation import Source
from llava_kd.data.sources.mixture import Mixture
from llava_kd.data.teacher_store.store import TeacherCache
from llava_kd.data.text.private import Tagger

_READING = Reading()


class StepRecords:
    """Which records a rank reads at a step, and their source, for a reader beside the loader's thread."""

    def __init__(self, source: Source, plan: Plan | Listing, rank: int) -> None:
        self.source, self._plan = copy.deepcopy((source, plan))  # neither is made for several threads
        self._rank = rank

    def numbers(self, step: int) -> list[int]:
        """In the order of the step's micro-batches, and of the records in them."""
        return [number for row in self._plan.rows(step, self._rank) for number in row]


class Loader:
    """Micro-batches of optimiser steps. `teacher` is None where it reads exactly what the student reads.

    Epochs follow each other without a seam (see `Plan`); a step of the same number holds the same records
    with any number of workers, and over all ranks with any number of ranks. The telemetry counts the parts
    of a `Mixture` apart.
    """

    def __init__(
        self,
        *,
        source: Source,
        student: AnySide,
        teacher: AnySide | None,
        order: Order,
        device: torch.device | str,
        reading: Reading = _READING,
        teacher_cache: TeacherCache | None = None,
        tagger: Tagger | None = None,
    ) -> None:
        """`teacher_cache` gives batches their `teacher_rows`, `tagger` their `scores_BT`."""
        self._device = torch.device(device)
        check_decoder(reading.decoder, self._device)
        self._ahead = Ahead(self._device)
        self._source, self._rank = source, order.rank
        self._sides = sides = (student,) if teacher is None else (student, teacher)
        self._plan = plan = _plan(source, sides, order, reading)
        self._dataset = MicroBatches(
            source=source, sides=sides, plan=plan, order=order, reading=reading,
            leaves_raw=self._device.type == "cuda", teacher_cache=teacher_cache, tagger=tagger,
        )  # fmt: skip
        self._micros_per_step = -(-(plan.rows_per_step // order.world_size) // order.micro_batch_size)
        self._num_workers = reading.num_workers
        bad_path = None if reading.bad_records_path is None else Path(reading.bad_records_path)
        per_epoch = len(source) / order.world_size
        self._bad_records = BadRecords(
            max_rate=reading.max_bad_rate, records_per_epoch=per_epoch, path=bad_path
        )
        self._parts = source.names if isinstance(source, Mixture) else ()
        self._since_last_call = _zero_telemetry(self._parts)
        self.steps_per_epoch = plan.steps_per_epoch
        print_of_order = repr((order.seed, plan.rows_per_step, order.packing))
        parts = [source.fingerprint, *(side.fingerprint for side in sides), print_of_order]
        parts += [] if tagger is None else [tagger.fingerprint]
        self.fingerprint = hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def records(self) -> StepRecords:
        """A second reader of the same records. To be made before batches are read."""
        return StepRecords(self._source, self._plan, self._rank)

    def batches(self, first_step: int, last_step: int) -> Iterator[list[Batch]]:
        """The micro-batches of each of the steps `first_step`, ..., `last_step - 1`; steps count from 0."""
        keys = ((step, m) for step in range(first_step, last_step) for m in range(self._micros_per_step))
        batches = self._batches(self._micros(keys))
        for _ in range(first_step, last_step):
            started = time.perf_counter()
            group = [next(batches) for _ in range(self._micros_per_step)]
            self._since_last_call["data_wait_s"] += time.perf_counter() - started
            yield group

    def telemetry(self) -> dict[str, float]:
        """Seconds waited for data, and counts, since the last call."""
        result, self._since_last_call = self._since_last_call, _zero_telemetry(self._parts)
        return result

    def _micros(self, keys: Iterator[tuple[int, int]]) -> Generator[Micro, None, None]:
        if self._num_workers == 0:
            for key in keys:
                yield self._dataset[key]
            return
        workers = DataLoader(
            Guarded(self._dataset),
            batch_size=None,
            sampler=keys,
            num_workers=self._num_workers,
            multiprocessing_context=worker_context("llava_kd.data.batches.micro_batches"),
            worker_init_fn=end_with_parent,
            prefetch_factor=4,
        )
        refusal = None
        try:
            for micro in workers:
                if isinstance(micro, Refusal):
                    refusal = micro
                    break
                yield micro
        except (RuntimeError, EOFError, OSError) as error:  # a batch on its way may break off in several ways
            if "Caught" in str(error):  # raised by the worker, which lives
                raise
            raise RuntimeError(
                f"a data worker process died ({error}); the machine may be out of memory: lower "
                "data.num_workers"
            ) from error
        if refusal is not None:
            raise refusal.error()

    def _batches(self, micros: Generator[Micro, None, None]) -> Iterator[Batch]:
        try:
            for micro, batch in self._ahead.run(micros, self._sides):
                self._count(micro)
                yield batch
        finally:
            micros.close()  # ends the workers

    def _count(self, micro: Micro) -> None:
        """Add up what came; ValueError if the run must stop for its bad records."""
        counts = self._since_last_call
        segments_BT = micro.rows[0].segment_ids_BT
        counts["records"] += len(micro.record_ids)
        counts["images"] += micro.num_images
        counts["tokens"] += int((segments_BT > 0).sum())
        counts["token_places"] += segments_BT.numel()
        counts["truncated_records"] += micro.num_truncated
        counts["bad_records"] += len(micro.bad)
        for name in set(micro.sources).intersection(self._parts):
            counts[f"records/{name}"] += micro.sources.count(name)
        for record in micro.bad:
            name = f"bad_records/{record.source}"
            counts[name] = counts.get(name, 0.0) + 1.0
        self._bad_records.add(micro.bad, num_read=len(micro.record_ids))


def _plan(source: Source, sides: tuple[AnySide, ...], order: Order, reading: Reading) -> Plan | Listing:
    if order.records is not None:
        return Listing(order.records, rows_per_step=order.global_batch_size)
    return Plan(
        num_records=len(source), seed=order.seed, global_batch_size=order.global_batch_size,
        world_size=order.world_size, packing=order.packing,
        sizes=_sizes(source, sides, order.packing, reading),
    )  # fmt: skip


def _sizes(
    source: Source, sides: tuple[AnySide, ...], packing: Packing | None, reading: Reading
) -> RecordSizes | None:
    if packing is None:
        return None
    sides = tuple(side for side in sides if isinstance(side, Side))  # the others take a row for each record
    longest = max(side.max_length for side in sides)
    if packing.max_tokens < longest:
        raise ValueError(
            f"packing.max_tokens must be at least data.max_length, {longest}; got {packing.max_tokens}"
        )
    sizes = record_sizes(source, sides, cache=reading.cache, progress=reading.progress)
    if over := (sizes.images > packing.max_images).nonzero()[0].tolist():
        first, most = source.record(over[0]).id, int(sizes.images.max())
        raise ValueError(
            f"a pack may hold {packing.max_images} images, but record {first} alone has "
            f"{sizes.images[over[0]]} ({len(over)} such records); raise data.packing.max_images to {most}, "
            "or leave these records out"
        )
    return sizes


def _zero_telemetry(parts: tuple[str, ...]) -> dict[str, float]:
    names = ("data_wait_s", "records", "images", "tokens", "token_places", "truncated_records", "bad_records")
    by_part = [f"{what}/{part}" for part in parts for what in ("records", "bad_records")]
    return dict.fromkeys((*names, *by_part), 0.0)
