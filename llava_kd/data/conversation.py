"""One conversation about images, and how the entries of LLaVA files are read and checked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Literal, Protocol

IMAGE_PLACEHOLDER = "<image>"
_ERRORS_SHOWN = 10
ROLES: dict[str, Literal["user", "assistant"]] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}


@dataclass(frozen=True)
class Turn:
    role: Literal["user", "assistant"]
    text: str


@dataclass(frozen=True, kw_only=True)
class Record:
    """One conversation. `images` are paths below the image root, in the order of the placeholders."""

    id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    extra: Mapping[str, str] = field(default_factory=dict)


class Source(Protocol):
    """Map-style records; every source of the loader has this shape."""

    def __len__(self) -> int: ...

    def record(self, i: int) -> Record: ...

    def image_bytes(self, i: int, k: int) -> bytes:
        """Encoded bytes of image `k`. ValueError or OSError if it cannot be read."""
        ...

    def name_of(self, i: int) -> str:
        """Name of the file or mixture part that record `i` comes from."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash of the records; two sources with the same one give the same batches."""
        ...


def canonical(text: str) -> str:
    """Text without outer whitespace; a single image placeholder comes first, on a line of its own."""
    text = text.strip()
    if text.count(IMAGE_PLACEHOLDER) != 1:
        return text
    rest = text.replace(IMAGE_PLACEHOLDER, "").strip()
    return f"{IMAGE_PLACEHOLDER}\n{rest}" if rest else IMAGE_PLACEHOLDER


def parse_record(raw: object, position: int) -> Record:
    """Record from one entry of a LLaVA file. ValueError says what is wrong, and in which record."""
    if not isinstance(raw, dict):
        raise ValueError(f"record at position {position} must be an object, got {type(raw).__name__}")
    record_id = str(raw["id"]) if raw.get("id") is not None else str(position)
    try:
        turns = _turns(raw.get("conversations"))
        images = _images(raw)
    except ValueError as error:
        raise ValueError(f"record {record_id!r}: {error}") from None
    placeholders = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns)
    if placeholders != len(images):
        raise ValueError(
            f"record {record_id!r}: every image needs one {IMAGE_PLACEHOLDER} in a user turn, got "
            f"{placeholders} for {len(images)} images"
        )
    known = ("id", "image", "images", "conversations")
    extra = {k: str(v) for k, v in raw.items() if k not in known and isinstance(v, (str, int, float))}
    return Record(id=record_id, images=images, turns=turns, extra=extra)


def _turns(conversations: object) -> tuple[Turn, ...]:
    if not isinstance(conversations, list) or not conversations:
        raise ValueError("no conversations; give a list of human and gpt turns")
    turns = []
    for number, raw in enumerate(conversations):
        if not isinstance(raw, dict) or not isinstance(raw.get("value"), str):
            raise ValueError(f"turn {number} must have `from` and a string `value`")
        speaker = raw.get("from")
        if not isinstance(speaker, str) or speaker not in ROLES:
            raise ValueError(f"turn {number} has the unknown role {speaker!r}; roles are {sorted(ROLES)}")
        role = ROLES[speaker]
        expected = "assistant" if number % 2 else "user"
        if role != expected:
            raise ValueError(f"turn {number} must be from the {expected}, got {speaker!r}: roles alternate")
        text = canonical(raw["value"])
        if role == "assistant" and not text:
            raise ValueError(f"turn {number} is an empty answer")
        if role == "assistant" and IMAGE_PLACEHOLDER in text:
            raise ValueError(
                f"turn {number} is an answer with {IMAGE_PLACEHOLDER}; images belong to the user"
            )
        turns.append(Turn(role, text))
    if turns[-1].role != "assistant":
        raise ValueError("the last turn must be an answer")
    return tuple(turns)


def _images(raw: dict) -> tuple[str, ...]:
    given = [raw[key] for key in ("image", "images") if raw.get(key)]
    if len(given) > 1:
        raise ValueError("give `image` or `images`, not both")
    images = given[0] if given else []
    if isinstance(images, str):
        images = [images]
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise ValueError("`image` must be a path or a list of paths")
    for image in images:
        path = PurePosixPath(image)
        if path.is_absolute() or ".." in path.parts or "\\" in image or "\0" in image:
            raise ValueError(f"the image path {image!r} must stay below the image root")
    return tuple(images)


def _not_json(where: str, error: json.JSONDecodeError | UnicodeDecodeError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"{where} must be UTF-8 text, but byte {error.start} is not: {error.reason}; save it as UTF-8"
    return f"{where} is not JSON: {error}; write it again, or mend it there"


def read_entries(path: Path) -> Iterator[object]:
    """Entries of a JSON list, or of JSON Lines where the name ends in .jsonl."""
    if not path.is_file():
        raise ValueError(f"no data file {path}; give a LLaVA .json or .jsonl file")
    if path.suffix != ".jsonl":
        try:
            entries = json.loads(path.read_bytes())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(_not_json(str(path), error)) from None
        if not isinstance(entries, list):
            raise ValueError(f"{path} must hold a list of records, got {type(entries).__name__}")
        yield from entries
        return
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(_not_json(f"{path} line {number}", error)) from None


def entry_with_images(raw: object, key: str, images: list[str]) -> dict:
    """LLaVA entry whose images are embedded beside it; `key` is its id if it has none."""
    if not isinstance(raw, dict):
        raise ValueError(f"must be an object, got {type(raw).__name__}")
    kept = {name: value for name, value in raw.items() if name not in ("image", "images")}
    return {"id": key, **kept, "images": images}


def parse_all(entries: Iterable[object]) -> tuple[list[Record], list[str]]:
    """Sound records in order, and what is wrong with the others."""
    records: list[Record] = []
    errors: list[str] = []
    for position, raw in enumerate(entries):
        try:
            records.append(parse_record(raw, position))
        except ValueError as error:
            errors.append(str(error))
    return records, errors


def checked(entries: Iterable[object], where: str, errors: Iterable[str] = ()) -> list[Record]:
    """Every record. ValueError names `where`, the unusable records, and the `errors` found before."""
    records, more = parse_all(entries)
    if found := [*errors, *more]:
        shown = "\n  ".join(found[:_ERRORS_SHOWN])
        raise ValueError(f"{where} has {len(found)} unusable records; mend or remove them:\n  {shown}")
    if not records:
        raise ValueError(f"{where} has no records")
    return records


def unique_ids(records: Iterable[Record]) -> list[Record]:
    """The records, with `#2`, `#3`, ... after an id that came before: LLaVA's files reuse an image's id."""
    result = []
    seen: dict[str, int] = {}
    for record in records:
        record_id = record.id
        while record_id in seen:
            seen[record.id] += 1
            record_id = f"{record.id}#{seen[record.id]}"
        seen[record_id] = 1
        result.append(record if record_id == record.id else replace(record, id=record_id))
    return result
