"""One conversation about images, and how an entry of a data file becomes one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from llava_kd.data.sources.pictures.image_paths import IMAGE_KEYS, image_path
from llava_kd.data.sources.pictures.lost_pictures import (
    check_boxes,
    check_media,
    check_no_picture_is_lost,
)

IMAGE_PLACEHOLDER = "<image>"
# Fields that hold lists and are kept, as JSON: which words of the answers are private, and what the pictures
# say.
PRIVATE_SPANS, OCR_TOKENS = LISTS = ("private_spans", "ocr_tokens")
_ERRORS_SHOWN = 10
_ID_SHOWN = 80
# By which other tools leave an answer out of the loss, with a value that counts as false.
_LOSS_MARKS = ("loss", "loss_scale", "weight", "train", "trainable")
Role = Literal["system", "user", "assistant"]
ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
TALKS = ("conversations", "messages")
SYSTEM = "system"
HALF_OF_A_PAIR = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Turn:
    role: Role
    text: str


@dataclass(frozen=True, kw_only=True)
class Record:
    """One conversation. `images` are paths below the image root, in the order of the placeholders.

    "<image>" stands for an image in the user's turns of a record that has images; elsewhere it is a word. A
    record with a `fault` cannot be used: it keeps its place, without turns. A `note` says how one was mended.
    `template` names the one that its source has of its own.
    """

    id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    extra: Mapping[str, str] = field(default_factory=dict)
    fault: str = ""
    note: str = ""
    template: str | None = None

    def has_places(self, turn: Turn) -> bool:
        """Whether "<image>" stands for an image in this turn."""
        return bool(self.images) and turn.role == "user"


@dataclass(frozen=True)
class Broken:
    """An entry that could not be read, in its place."""

    reason: str
    key: str | None = None


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
    """Record from one entry of a data file. ValueError says what is wrong, and in which record."""
    name = _name(raw, position)
    if not isinstance(raw, dict):
        if isinstance(raw, Broken):
            raise ValueError(f"record {name[:_ID_SHOWN]!r}: {raw.reason}")
        raise ValueError(f"record at position {position} must be an object, got {type(raw).__name__}")
    try:
        check_media(raw)
        given = _talk(raw)
        turns, inside = _turns(given)
        _check_numbers(given)
        check_boxes(raw, [turn.text for turn in turns])
        first = _first_question(turns)
        images = _images(raw) or tuple(image for said in inside[first:] for image in said)
        if not images:
            asked = [turn.text for turn in turns if turn.role == "user"]
            check_no_picture_is_lost(raw, given, asked, IMAGE_PLACEHOLDER)
        system = _system(raw, turns)
        talk, moved = _with_places(turns[first:], len(images))
        extra = {
            _clean(key): _clean(value)
            for key, value in raw.items()
            if key not in ("id", SYSTEM, *IMAGE_KEYS, *TALKS) and isinstance(value, (str, int, float))
        }
        extra |= {key: json.dumps(raw[key], default=str) for key in LISTS if isinstance(raw.get(key), list)}
    except RecursionError:
        raise ValueError(f"record {name[:_ID_SHOWN]!r}: is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"record {name[:_ID_SHOWN]!r}: {error}") from None
    began = (
        "its first turn is an answer without a question and is skipped"
        if _begins_with_an_answer(turns)
        else ""
    )
    note = "; ".join(part for part in (began, moved) if part)
    return Record(id=name, images=images, turns=(*system, *talk), extra=extra, note=note)


def read_record(raw: object, position: int) -> Record:
    """The record of an entry; of one that cannot be used, its place and its fault."""
    try:
        return parse_record(raw, position)
    except ValueError as error:
        return Record(id=_name(raw, position), images=(), turns=(), fault=str(error))


def _name(raw: object, position: int) -> str:
    given = raw.get("id") if isinstance(raw, dict) else raw.key if isinstance(raw, Broken) else None
    try:
        return str(position) if given is None else _clean(given)
    except (ValueError, RecursionError):  # a number of thousands of digits
        return str(position)


def _clean(value: object) -> str:
    """As text that can be written to any file: half of a surrogate pair is spelt out."""
    return str(value).encode("utf-8", "backslashreplace").decode()


def _turns(talk: object) -> tuple[list[Turn], list[list[str]]]:
    """Turns as they are said, and the paths of the images that stand inside of each."""
    if not isinstance(talk, list):
        got = f", got {type(talk).__name__}" if talk is not None else ""
        raise ValueError(
            f"no conversations{got}; give `conversations`, a list of turns with `from` and `value`, or "
            "`messages`, a list of turns with `role` and `content`"
        )
    turns, inside = [], []
    for number, said in enumerate(talk):
        if not isinstance(said, dict):
            raise ValueError(f"turn {number} must be an object, got {type(said).__name__}")
        speaker = said.get("from") or said.get("role")
        if not isinstance(speaker, str) or speaker not in ROLES:
            shown = repr(speaker)[:_ID_SHOWN]
            raise ValueError(f"turn {number} has the unknown role {shown}; roles are {sorted(ROLES)}")
        if ROLES[speaker] == "assistant":
            _check_counts(said, number)
        content = said["value"] if said.get("value") is not None else said.get("content")
        text, images = _content(content, number)
        turns.append(Turn(ROLES[speaker], _whole(text, f"turn {number}").strip()))
        inside.append(images)
    return turns, inside


def _check_numbers(talk: Iterable[dict]) -> None:
    """ValueError where image parts number their pictures (`index`, as of `datasets`) in another order."""
    parts = [part for said in talk if isinstance(said.get("content"), list) for part in said["content"]]
    shown = [
        part["index"]
        for part in parts
        if isinstance(part, dict) and part.get("type") == "image" and isinstance(part.get("index"), int)
    ]
    if shown != list(range(len(shown))):
        raise ValueError(
            f"its image parts have the numbers {shown[:_ERRORS_SHOWN]}, and pictures are read in order, "
            "each once; list them as the talk shows them"
        )


def _check_counts(said: dict, number: int) -> None:
    for mark in _LOSS_MARKS:
        if (value := said.get(mark)) is not None and not value:
            raise ValueError(
                f"turn {number} is an answer with `{mark}` {value}, which is to be left out of the loss, and "
                "every answer of a record is trained on; end the talk before it, or leave the record out"
            )


def _talk(raw: dict) -> Any:
    """As given, or as tables hold it: the JSON in a column of texts, or a column for each key of a turn."""
    talk = next((raw[key] for key in TALKS if raw.get(key)), None)
    if isinstance(talk, dict):
        columns = {key: column for key, column in talk.items() if isinstance(column, list)}
        if len({len(column) for column in columns.values()}) == 1:
            rows = zip(*columns.values(), strict=True)
            return [dict(zip(columns, row, strict=True)) for row in rows] or None
    if isinstance(talk, str) and talk.lstrip().startswith("["):
        try:
            return json.loads(talk) or None
        except ValueError as error:
            raise ValueError(f"its conversation is a text that is no JSON: {error}") from None
    return talk


def _system(raw: dict, turns: Sequence[Turn]) -> list[Turn]:
    """The first turn, if it is one with words; or the text under `system`, where some formats have it."""
    said = [turn for turn in turns[:1] if turn.role == "system" and turn.text]
    beside = raw.get(SYSTEM)
    if not isinstance(beside, str) or not beside.strip():
        return said
    turn = Turn("system", _whole(beside, f"`{SYSTEM}`").strip())
    if said and said != [turn]:
        raise ValueError(f"it has two system texts, a first turn and `{SYSTEM}`; keep one")
    return [turn]


def _whole(text: str, where: str) -> str:
    if half := HALF_OF_A_PAIR.search(text):
        raise ValueError(
            f"{where} holds half of a surrogate pair, {half[0]!r}: its text was cut inside a "
            "character such as an emoji; remove it"
        )
    return text


def _content(content: object, number: int) -> tuple[str, list[str]]:
    """Text of a turn, from a string or from parts, and the paths that its image parts give."""
    if isinstance(content, str):
        return content, []
    if content is None:
        raise ValueError(f"turn {number} must have `from` and a string `value`, or `role` and `content`")
    if not isinstance(content, list):
        kind = type(content).__name__
        raise ValueError(
            f"the text of turn {number} is {str(content)[:_ID_SHOWN]} of type {kind}; write it as a string"
        )
    pieces, images = [], []
    for place, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else "text" if isinstance(part, str) else None
        if kind == "text":
            text = part if isinstance(part, str) else part.get("text")
            if not isinstance(text, str):
                raise ValueError(f"turn {number}: part {place} is of type text but has no text")
            pieces.append(text)
        elif kind in ("image", "image_url") and isinstance(part, dict):
            pieces.append(IMAGE_PLACEHOLDER + "\n" * (place < len(content) - 1))
            given = next((part[key] for key in ("image", "image_url", "url", "path") if part.get(key)), None)
            given = given.get("url") if isinstance(given, dict) else given
            if given is not None:
                images.append(image_path(given))
        else:
            raise ValueError(f"turn {number}: part {place} must be of type text or image, got {kind!r}")
    return "".join(pieces), images


def _begins_with_an_answer(turns: list[Turn]) -> bool:
    spoken = turns[1:] if turns[0].role == "system" else turns
    return bool(spoken) and spoken[0].role == "assistant"


def _first_question(turns: list[Turn]) -> int:
    """Number of the turn from which on questions and answers follow each other, checked.

    A system turn may stand before it, and an answer, which is left out as in LLaVA.
    """
    first = int(turns[0].role == "system") + int(_begins_with_an_answer(turns))
    for number, turn in enumerate(turns[first:], start=first):
        expected = "assistant" if (number - first) % 2 else "user"
        if turn.role != expected:
            raise ValueError(
                f"turn {number} must be from the {expected}, got {turn.role}: roles alternate, and a system "
                "turn comes first"
            )
        if turn.role == "assistant" and not turn.text:
            raise ValueError(f"turn {number} is an empty answer")
    if turns[-1].role != "assistant" or len(turns) == first:
        raise ValueError("the last turn must be an answer")
    return first


def _with_places(turns: list[Turn], images: int) -> tuple[list[Turn], str]:
    """The turns with one placeholder an image; without any, the images come before the first question."""
    if not images:
        return turns, ""
    for turn in turns:
        if turn.role == "assistant" and IMAGE_PLACEHOLDER in turn.text:
            raise ValueError(
                f"an answer holds {IMAGE_PLACEHOLDER} in a record with images; images belong to the user"
            )
    asked = [turn for turn in turns if turn.role == "user"]
    places = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in asked)
    if places not in (0, images):
        raise ValueError(
            f"every image needs one {IMAGE_PLACEHOLDER} in a user turn, got {places} for {images} images"
        )
    first = f"{IMAGE_PLACEHOLDER}\n" * images if places == 0 else ""
    placed = []
    for turn in turns:
        if turn.role == "user":
            turn, first = Turn("user", canonical(first + turn.text)), ""
        placed.append(turn)
    note = "" if places else f"no turn has {IMAGE_PLACEHOLDER}: its images are put before the first question"
    return placed, note


def _images(raw: dict) -> tuple[str, ...]:
    given = [raw[key] for key in IMAGE_KEYS if raw.get(key) and not _is_nan(raw[key])]
    if len(given) > 1:
        raise ValueError("give `image` or `images`, not both")
    images = given[0] if given else []
    if isinstance(images, (str, dict)):
        images = [images]
    if not isinstance(images, list):
        raise ValueError(f"`image` must be a path or a list of paths, got {type(images).__name__}")
    return tuple(map(image_path, images))


def _is_nan(value: object) -> bool:
    """What pandas writes where a cell is empty."""
    return isinstance(value, float) and value != value


def entry_with_images(raw: object, key: str, images: list[str]) -> dict:
    """LLaVA entry whose images are embedded beside it; `key` is its id if it has none."""
    if not isinstance(raw, dict):
        raise ValueError(f"must be an object, got {type(raw).__name__}")
    kept = {name: value for name, value in raw.items() if name not in IMAGE_KEYS}
    return {"id": key, **kept, "images": images}


def read_records(entries: Iterable[object], where: str) -> list[Record]:
    """Every entry as a record, with an id of its own. ValueError if none of them can be used."""
    records = unique_ids(read_record(raw, position) for position, raw in enumerate(entries))
    if not records:
        raise ValueError(f"{where} has no records")
    if all(record.fault for record in records):
        shown = "\n  ".join(record.fault for record in records[:_ERRORS_SHOWN])
        raise ValueError(f"{where} has {len(records)} unusable records and no other; fix them:\n  {shown}")
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
