"""A user's pictures and what is said of them, found, checked and split into records of three files."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from llava_kd.curation.spreadsheets import TABLES, choose_columns, is_table, read_rows, to_records
from llava_kd.data.sources.conversation import read_record, read_records
from llava_kd.data.sources.entries import read_entries

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
METADATA = ("metadata.jsonl", "metadata.csv")  # names that image folders give their table
SHOWN = 5
LEAST_SPLIT = 30  # records below which nothing is held out
MOST_HELD_OUT = 1_000
MOST_COPIED = 20_000  # larger files of LLaVA records are read where they are


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a user said of their data; None is found out."""

    images: str | None = None
    data: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    question: str | None = None
    held_out: float = 0.1
    skip_bad: bool = False


@dataclass(frozen=True, kw_only=True)
class OwnData:
    """`splits` holds entries by the name of their file; without any, `path` is read where it is.

    `longest` is the most bytes of text of a record, `images_of_one` its most pictures.
    """

    images: Path
    path: Path
    splits: Mapping[str, Sequence[Mapping]]
    num_records: int
    longest: int
    images_of_one: int
    notes: tuple[str, ...]


def refuse_taken(target: Path) -> None:
    """ValueError for a project folder that holds something already."""
    if target.is_dir() and (held := sorted(path.name for path in target.iterdir())):
        raise ValueError(
            f"{target} is not empty (it contains {', '.join(held[:3])}); name a new folder. If it contains "
            f"your pictures: llava-kd init PROJECT --images {target}"
        )
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; name a new folder")


def find_data(given: Given, here: Path) -> OwnData:
    """Raises ValueError for a folder without pictures, a file without records, and bad records.

    Bad are rows that lack a cell, records that cannot be read, and pictures that are not there;
    `given.skip_bad` leaves them out.
    """
    named = None if given.data is None else Path(given.data).absolute()
    images = Path(given.images or (named.parent if named else here)).absolute()
    if not images.is_dir():
        raise ValueError(f"no image folder {images}; name the folder of your pictures with --images")
    if next(_pictures(images), None) is None:
        raise ValueError(
            f"{images} and its subfolders contain no picture ({', '.join(PICTURES)}); name the folder of "
            "your pictures with --images"
        )
    path = named or _table_in(images)
    entries, faults, notes = _entries(path, given)
    entries, missing = _with_pictures(entries, images)
    faults += missing
    if faults:
        shown = [f"  {line}" for line in faults[:SHOWN]]
        more = [f"  and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
        if not given.skip_bad:
            what = f"{len(faults)} records of {path} are bad; fix them, or leave them out with --skip_bad:"
            raise ValueError("\n".join([what, *shown, *more]))
        notes.append("\n".join([f"{len(faults)} bad records of {path} are left out:", *shown, *more]))
    if not entries:
        raise ValueError(f"{path} must contain at least one usable record; it has none")
    splits, said = _split(entries, given.held_out, is_copied=is_table(path) or len(entries) <= MOST_COPIED)
    sizes = [_size(entry) for entry in entries]
    return OwnData(
        images=images,
        path=path,
        splits=splits,
        num_records=len(splits.get("train", entries)),
        longest=max(size for size, _ in sizes),
        images_of_one=max(count for _, count in sizes),
        notes=(*notes, *said),
    )


def _pictures(folder: Path) -> Iterator[str]:
    for where, folders, files in os.walk(folder):
        folders.sort()
        yield from (os.path.join(where, name) for name in sorted(files) if name.lower().endswith(PICTURES))


def _table_in(folder: Path) -> Path:
    for name in METADATA:
        if (folder / name).is_file():
            return folder / name
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in (*TABLES, ".json", ".jsonl"))
    if len(found) == 1:
        return found[0]
    which = f"{', '.join(p.name for p in found)}: several candidates" if found else "no table"
    raise ValueError(
        f"{folder} contains {which}; name the .csv, .xlsx or LLaVA .json file of your pictures with --data"
    )


def _entries(path: Path, given: Given) -> tuple[list[dict], list[str], list[str]]:
    """Entries, what is wrong with others, and what to say."""
    if is_table(path):
        names, rows = read_rows(path)
        columns = choose_columns(path, names, given.columns, given.question)
        entries, faults = to_records(rows, columns)
        asked = f"`{columns.question}`" if columns.question else "one for all"
        said = f"columns: picture `{columns.image}`, question {asked}, answer `{columns.answer}`"
        return entries, faults, [said]
    if given.columns or given.question:
        raise ValueError(
            f"--columns and --question need a table (.csv, .xlsx), but {path} is none; leave them out"
        )
    raw = list(read_entries(path))
    records = read_records(raw, str(path))
    faults = [record.fault for record in records if record.fault]
    kept = zip(raw, records, strict=True)
    return [entry for entry, record in kept if isinstance(entry, dict) and not record.fault], faults, []


def _names(entry: Mapping) -> tuple[str, ...]:
    return read_record(entry, 0).images


def _with_pictures(entries: list[dict], root: Path) -> tuple[list[dict], list[str]]:
    """Entries whose pictures are there, by their names below `root`; and a line for each of the others."""
    kept, faults = [], []
    known: list[str] | None = None
    for position, entry in enumerate(entries):
        record = read_record(entry, position)
        if record.fault:
            faults.append(record.fault)
            continue
        names = record.images
        places = {name: _below(name, root) for name in names}
        lost = [name for name, place in places.items() if place is None]
        if not lost:
            moved = any(name != place for name, place in places.items())
            key = "image" if "image" in entry else "images"
            new = [places[name] for name in names]
            kept.append({**entry, key: new[0] if len(new) == 1 else new} if moved else entry)
            continue
        hint = ""
        if len(faults) < SHOWN:
            known = known or [os.path.relpath(p, root) for p in islice(_pictures(root), MOST_COPIED)]
            near = difflib.get_close_matches(lost[0], known, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
        faults.append(f"{entry.get('id')}: no picture {lost[0]} below {root}{hint}")
    return kept, faults


def _below(name: str, root: Path) -> str | None:
    """The name of a picture below `root`; the table may give it from the folder above."""
    for path in (Path(name) if os.path.isabs(name) else root / name, root.parent / name):
        inside = os.path.relpath(os.path.normpath(path), root)
        if not inside.startswith("..") and path.is_file():
            return inside
    return None


def _size(entry: Mapping) -> tuple[int, int]:
    record = read_record(entry, 0)
    return sum(len(turn.text.encode(errors="replace")) for turn in record.turns), len(record.images)


def _split(entries: list[dict], share: float, *, is_copied: bool) -> tuple[dict[str, list[dict]], list[str]]:
    """Train, validation and test by picture, so that none is in two of them; the same whatever the order."""
    if not is_copied:
        said = f"{len(entries)} records are read from the original file, and none is held out"
        return {}, [f"{said}; use your own records to score"]
    if share == 0 or len(entries) < LEAST_SPLIT:
        why = "" if share == 0 else f": {len(entries)} records are less than {LEAST_SPLIT}"
        return {"train": entries}, [f"nothing is held out to score the student on{why}"]
    by_picture: dict[str, list[dict]] = {}
    for entry in entries:
        by_picture.setdefault(next(iter(_names(entry)), str(entry.get("id"))), []).append(entry)
    order = sorted(by_picture, key=lambda name: hashlib.sha256(name.encode(errors="replace")).digest())
    splits: dict[str, list[dict]] = {"test": [], "validation": [], "train": []}
    size = min(MOST_HELD_OUT, max(1, round(share * len(entries))))
    for name in order:
        open_ = next((s for s in ("test", "validation") if len(splits[s]) < size), "train")
        splits[open_] += by_picture[name]
    if not splits["train"]:
        return {"train": entries}, ["nothing is held out: too few pictures to split the records by picture"]
    counts = ", ".join(f"{len(splits[name])} {name}" for name in ("train", "validation", "test"))
    return splits, [f"records: {counts}; no picture is in two of them"]


def write_splits(data: OwnData, folder: Path) -> None:
    folder.mkdir()
    for name, entries in data.splits.items():
        text = json.dumps(entries, ensure_ascii=False, indent=1)
        (folder / f"{name}.json").write_text(f"{text}\n", encoding="utf-8")
