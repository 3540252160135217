"""Bad records of a run: named in a file, counted, and a reason to stop where there are too many."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from llava_kd.durable import Lines

_ALWAYS_ALLOWED = 3
_SHOWN = 20
REMEDY = (
    "`llava-kd data verify --data FILE --write_sound NEW` writes a file without them; use that, fix them, "
    "or raise data.max_bad_rate"
)


@dataclass(frozen=True, kw_only=True)
class BadRecord:
    id: str
    source: str
    reason: str


class BadRecords:
    """What was bad so far.

    The run stops once more than `max_rate` of the records are bad, counted over those read so far or over
    one epoch, whichever is more. Up to three never stop a run, unless the rate is 0: that stops at the first.
    """

    def __init__(self, *, max_rate: float, records_per_epoch: float, path: Path | None) -> None:
        self._max_rate = max_rate
        self._records_per_epoch = records_per_epoch
        self._path = path
        self._num_read = 0
        self._bad: list[BadRecord] = []

    def add(self, bad: tuple[BadRecord, ...], *, num_read: int) -> None:
        """Write down the bad ones of `num_read` records. ValueError with the list if the run must stop."""
        self._num_read += num_read
        if not bad:
            return
        self._bad.extend(bad)
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with closing(Lines(self._path)) as lines:
                lines.write("".join(json.dumps(asdict(record)) + "\n" for record in bad))
        if len(self._bad) > _allowed(self._max_rate, max(self._num_read, self._records_per_epoch)):
            raise ValueError(
                _too_many(self._bad, f"{len(self._bad)} of the {self._num_read} records read", self._max_rate)
            )


def refuse_faults(faults: Sequence[BadRecord], *, num_records: int, max_rate: float) -> None:
    """ValueError if more of the records than a run allows are known to be bad before it reads any."""
    if len(faults) > _allowed(max_rate, num_records):
        raise ValueError(_too_many(faults, f"{len(faults)} of the {num_records} records", max_rate))


def _allowed(max_rate: float, count: float) -> float:
    return max(max_rate * count, _ALWAYS_ALLOWED) if max_rate > 0 else 0


def _too_many(found: Sequence[BadRecord], what: str, max_rate: float) -> str:
    shown = "\n  ".join(f"{bad.source}: {bad.id}: {bad.reason}" for bad in found[:_SHOWN])
    by_source = Counter(bad.source for bad in found)
    counts = ", ".join(f"{name}: {count}" for name, count in by_source.most_common())
    return f"{what} are bad, more than max_bad_rate {max_rate} allows ({counts}); {REMEDY}:\n  {shown}"
