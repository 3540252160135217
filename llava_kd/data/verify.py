"""The check of a dataset before a run: every record parsed, every image decoded, every answer measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from llava_kd.bar import Bar
from llava_kd.data.batches.model_side import Side
from llava_kd.data.pixels.images import decode
from llava_kd.data.sources.conversation import Record, Source, read_record, unique_ids
from llava_kd.data.sources.entries import read_entries
from llava_kd.data.sources.llava_json import read_confined
from llava_kd.data.sources.pictures.image_paths import named
from llava_kd.durable import write_whole
from llava_kd.relative import looked_from

_CHUNK = 1024
_SHOWN = 20
_ReadImage = Callable[[int, int], bytes]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was found. The token figures are None where no model was given to measure with.

    `unsound` holds the positions in the file of the records with any fault. The `mended` are sound, and so
    are those with `control_words`, which are read as text.
    """

    records: int
    text_only: int
    images: int
    structural_errors: tuple[str, ...]
    bad_images: tuple[str, ...]
    unencodable: tuple[str, ...] | None
    unsound: tuple[int, ...]
    mended: tuple[str, ...]
    control_words: tuple[str, ...] | None
    truncated: int | None
    tokens_mean: float | None
    tokens_p95: float | None
    tokens_max: int | None

    @property
    def is_sound(self) -> bool:
        return not (self.structural_errors or self.bad_images or self.unencodable)

    def save(self, path: str | Path) -> None:
        write_whole(Path(path), [(json.dumps(asdict(self), indent=1) + "\n").encode()])

    def summary(self) -> str:
        """A few lines for a person, with the first of each kind of fault."""
        total = self.records + len(self.structural_errors)
        lines = [
            f"{total - len(self.unsound)} of {total} records are sound; {self.images} images, "
            f"{self.text_only} records of text alone"
        ]
        for what, found in (
            ("records with structural errors", self.structural_errors),
            ("records with missing or unreadable images", self.bad_images),
            ("records that cannot be encoded", self.unencodable or ()),
            ("records are repaired while they are read", self.mended),
            ("records contain words of control tokens, which are read as text", self.control_words or ()),
        ):
            lines.append(f"{len(found)} {what}")
            lines += [f"  {line}" for line in found[:_SHOWN]]
            if len(found) > _SHOWN:
                lines.append(f"  ... and {len(found) - _SHOWN} more")
        if self.truncated is not None:
            share = self.truncated / max(self.records, 1)
            lines.append(f"{self.truncated} records ({share:.2%}) are truncated")
        if self.tokens_mean is not None:
            lines.append(
                f"tokens: mean {self.tokens_mean:.0f}, 95 % {self.tokens_p95:.0f}, most {self.tokens_max}"
            )
        return "\n".join(lines)


def verify_file(
    path: str | Path,
    image_root: str | Path,
    *,
    side: Side | None = None,
    follow_symlinks: bool = False,
    num_threads: int = 1,
    progress: bool = False,
) -> Report:
    """Check a LLaVA JSON or JSON Lines file, sound or not. ValueError only if it cannot be read at all."""
    records = unique_ids(read_record(raw, i) for i, raw in enumerate(read_entries(Path(path))))
    if not records:
        raise ValueError(f"{path} has no records; check that it is the file that you mean")
    root = Path(image_root).absolute()
    if not root.is_dir():
        raise ValueError(f"no image folder {image_root}{looked_from(image_root)}")

    def read(i: int, k: int) -> bytes:
        return read_confined(root, records[i].images[k], follow_symlinks=follow_symlinks)

    return _check(records, read, side=side, num_threads=num_threads, progress=progress)


def verify(
    source: Source, *, side: Side | None = None, num_threads: int = 1, progress: bool = False
) -> Report:
    """Check the records and images of a source that opened, and its tokens if `side` is given."""
    records = [source.record(i) for i in range(len(source))]
    return _check(records, source.image_bytes, side=side, num_threads=num_threads, progress=progress)


def _check(
    records: Sequence[Record], read: _ReadImage, *, side: Side | None, num_threads: int, progress: bool
) -> Report:
    structural = {i: record.fault for i, record in enumerate(records) if record.fault}
    bad_images: dict[int, str] = {}
    with ThreadPoolExecutor(num_threads) as threads:
        for chunk in _chunks(len(records), "checking images", progress):
            faults = threads.map(lambda i: _image_fault(records[i], i, read), chunk)
            bad_images |= {i: fault for i, fault in zip(chunk, faults, strict=True) if fault}
    sound = [record for record in records if not record.fault]
    tokens = None if side is None else _tokens(records, side, progress)
    lengths = tokens.lengths if tokens else []
    return Report(
        records=len(sound),
        text_only=sum(not record.images for record in sound),
        images=sum(len(record.images) for record in sound),
        structural_errors=tuple(structural.values()),
        bad_images=tuple(bad_images.values()),
        unencodable=None if tokens is None else tuple(tokens.faults.values()),
        unsound=tuple(sorted({*structural, *bad_images, *(tokens.faults if tokens else ())})),
        mended=tuple(f"record {record.id!r}: {record.note}" for record in sound if record.note),
        control_words=None if tokens is None else tuple(tokens.control_words),
        truncated=None if tokens is None else tokens.truncated,
        tokens_mean=float(np.mean(lengths)) if lengths else None,
        tokens_p95=float(np.quantile(lengths, 0.95)) if lengths else None,
        tokens_max=max(lengths) if lengths else None,
    )


@dataclass
class _Tokens:
    faults: dict[int, str] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    control_words: list[str] = field(default_factory=list)
    truncated: int = 0


def _tokens(records: Sequence[Record], side: Side, progress: bool) -> _Tokens:
    """What a model reads of the records that can be used."""
    found, encoder = _Tokens(), side.encoder()
    for chunk in _chunks(len(records), "checking tokens", progress):
        for i in chunk:
            if records[i].fault:
                continue
            try:
                encoded = encoder(records[i])
            except ValueError as error:
                found.faults[i] = str(error)
                continue
            found.lengths.append(len(encoded.ids))
            found.truncated += encoded.is_truncated
            if words := encoder.control_words(records[i]):
                found.control_words.append(f"record {records[i].id!r}: {', '.join(map(repr, words))}")
    return found


def _image_fault(record: Record, i: int, read: _ReadImage) -> str | None:
    """What is wrong with the images of a record."""
    for k, name in enumerate(record.images):
        try:
            decode(read(i, k))
        except (ValueError, OSError) as error:
            return f"record {record.id!r}: {named(error, name)}"
    return None


def _chunks(count: int, what: str, progress: bool) -> Iterator[range]:
    with Bar(count, what, "records", is_shown=progress) as bar:
        for start in range(0, count, _CHUNK):
            chunk = range(start, min(start + _CHUNK, count))
            yield chunk
            bar.advance(len(chunk))
