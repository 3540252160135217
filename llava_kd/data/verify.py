"""The check of a dataset before a run: every record parsed, every image decoded, every answer measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from llava_kd.data.conversation import Record, Source, parse_record, read_entries, unique_ids
from llava_kd.data.images import decode
from llava_kd.data.records import read_confined
from llava_kd.data.side import Side

_CHUNK = 1024
_SHOWN = 20
_ReadImage = Callable[[int, int], bytes]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was found. The token figures are None where no model was given to measure with.

    `unsound` holds the positions in the file of the records with any fault.
    """

    records: int
    text_only: int
    images: int
    structural_errors: tuple[str, ...]
    bad_images: tuple[str, ...]
    unencodable: tuple[str, ...] | None
    unsound: tuple[int, ...]
    truncated: int | None
    tokens_mean: float | None
    tokens_p95: float | None
    tokens_max: int | None

    @property
    def is_sound(self) -> bool:
        return not (self.structural_errors or self.bad_images or self.unencodable)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n")

    def summary(self) -> str:
        """A few lines for a person, with the first of each kind of fault."""
        lines = [f"{self.records} sound records ({self.text_only} text-only), {self.images} images"]
        for what, found in (
            ("records with structural errors", self.structural_errors),
            ("records with missing or unreadable images", self.bad_images),
            ("records that cannot be encoded", self.unencodable or ()),
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
    records, positions, errors = _parsed(path)
    root = Path(image_root).resolve()
    if not root.is_dir():
        raise ValueError(f"no image folder {image_root}")

    def read(i: int, k: int) -> bytes:
        return read_confined(root, records[i].images[k], follow_symlinks=follow_symlinks)

    checked = _check(records, read, errors, side=side, num_threads=num_threads, progress=progress)
    unsound = set(checked.unsound)
    sound = {position for i, position in enumerate(positions) if i not in unsound}
    total = len(records) + len(errors)
    return replace(checked, unsound=tuple(position for position in range(total) if position not in sound))


def _parsed(path: str | Path) -> tuple[list[Record], list[int], list[str]]:
    """Records of sound structure, their positions in the file, and what is wrong with the others."""
    records, positions, errors = [], [], []
    for position, raw in enumerate(read_entries(Path(path))):
        try:
            records.append(parse_record(raw, position))
            positions.append(position)
        except ValueError as error:
            errors.append(str(error))
    return unique_ids(records), positions, errors


def write_sound(path: str | Path, out: str | Path, report: Report) -> int:
    """Copy the entries without a fault from the LLaVA file of `report` to `out`; the number left behind.

    `out` is JSON Lines where its name ends in .jsonl, and a JSON list otherwise.
    """
    unsound = set(report.unsound)
    sound = [raw for position, raw in enumerate(read_entries(Path(path))) if position not in unsound]
    lines = [json.dumps(raw, ensure_ascii=False) for raw in sound]
    is_lines = Path(out).suffix == ".jsonl"
    text = "".join(f"{line}\n" for line in lines) if is_lines else "[\n" + ",\n".join(lines) + "\n]\n"
    Path(out).write_text(text, encoding="utf-8")
    return len(unsound)


def verify(
    source: Source, *, side: Side | None = None, num_threads: int = 1, progress: bool = False
) -> Report:
    """Check the images of a source that opened, and its tokens if `side` is given."""
    records = [source.record(i) for i in range(len(source))]
    return _check(records, source.image_bytes, (), side=side, num_threads=num_threads, progress=progress)


def _check(
    records: Sequence[Record],
    read: _ReadImage,
    structural: Sequence[str],
    *,
    side: Side | None,
    num_threads: int,
    progress: bool,
) -> Report:
    bad_images: dict[int, str] = {}
    with ThreadPoolExecutor(num_threads) as threads:
        for chunk in _chunks(len(records), "images", progress):
            faults = threads.map(lambda i: _image_fault(records[i], i, read), chunk)
            bad_images |= {i: fault for i, fault in zip(chunk, faults, strict=True) if fault}
    unencodable: dict[int, str] = {}
    lengths: list[int] = []
    truncated = 0
    if side is not None:
        encoder = side.encoder()
        for chunk in _chunks(len(records), "tokens", progress):
            for i in chunk:
                try:
                    encoded = encoder(records[i])
                except ValueError as error:
                    unencodable[i] = str(error)
                    continue
                lengths.append(len(encoded.ids))
                truncated += encoded.is_truncated
    return Report(
        records=len(records),
        text_only=sum(not record.images for record in records),
        images=sum(len(record.images) for record in records),
        structural_errors=tuple(structural),
        bad_images=tuple(bad_images.values()),
        unencodable=None if side is None else tuple(unencodable.values()),
        unsound=tuple(sorted({*bad_images, *unencodable})),
        truncated=None if side is None else truncated,
        tokens_mean=float(np.mean(lengths)) if lengths else None,
        tokens_p95=float(np.quantile(lengths, 0.95)) if lengths else None,
        tokens_max=max(lengths) if lengths else None,
    )


def _image_fault(record: Record, i: int, read: _ReadImage) -> str | None:
    """What is wrong with the images of a record."""
    for k, name in enumerate(record.images):
        try:
            decode(read(i, k))
        except (ValueError, OSError) as error:
            return f"record {record.id!r}: image {name!r}: {error}"
    return None


def _chunks(count: int, what: str, progress: bool) -> Iterator[range]:
    with tqdm(total=count, desc=what, unit=" records", disable=not progress) as bar:
        for start in range(0, count, _CHUNK):
            chunk = range(start, min(start + _CHUNK, count))
            yield chunk
            bar.update(len(chunk))
