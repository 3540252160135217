"""What steps are checked against: the protocol of evidence, and files that hold it by record."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from llava_kd.data.sources.conversation import Record
from llava_kd.data.sources.entries import loads

_MAX_BYTES = 4 << 30


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What evidence says of a claim. `fact` is what it holds, in words; `correction` the claim as it should
    be, nothing where the evidence does not say.
    """

    holds: bool
    fact: str
    correction: str = ""


Check = Callable[[str], Verdict | None]  # of a claim; None: it cannot be read by this evidence


class Evidence(Protocol):
    """`name` says which kind it is, `fingerprint` changes with what it holds."""

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def keys(self) -> Collection[str] | None:
        """Ids or image paths of the records that it is about; None: it is about all."""
        ...

    def about(self, record: Record) -> Check | None:
        """What checks the claims about a record; None where it knows nothing of it."""
        ...


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A verdict and whose it is."""

    by: str
    verdict: Verdict


class Checks:
    """Evidence in the order in which it is asked: the first that can read a claim decides."""

    def __init__(self, evidence: Sequence[Evidence]) -> None:
        if not evidence:
            raise ValueError("steps are checked against evidence; give a file or a folder of it")
        self.evidence = evidence

    @property
    def fingerprint(self) -> str:
        return " ".join(f"{one.name}:{one.fingerprint}" for one in self.evidence)

    def check_records(self, records: Sequence[Record], data: str | Path) -> None:
        """ValueError where evidence is about other records than these."""
        known = {key for record in records for key in (record.id, *record.images)}
        for one in self.evidence:
            if one.keys is not None and not known.intersection(one.keys):
                shown = ", ".join(map(repr, list(one.keys)[:3])) or "nothing"
                raise ValueError(
                    f"the {one.name} name no record of {data}: they are about {shown}; the first record is "
                    f"{records[0].id!r}. Give evidence by the id, or the image path, of these records"
                )

    def about(self, record: Record) -> Callable[[str], Checked | None] | None:
        found = [(one.name, check) for one in self.evidence if (check := one.about(record)) is not None]
        if not found:
            return None

        def read(claim: str) -> Checked | None:
            for name, check in found:
                if (verdict := check(claim)) is not None:
                    return Checked(by=name, verdict=verdict)
            return None

        return read


def of_record(by_key: Mapping[str, object], record: Record) -> object | None:
    """What a file holds of a record: by its id, else by its first image."""
    return next((by_key[key] for key in (record.id, *record.images[:1]) if key in by_key), None)


def read_by_key(path: str | Path, what: str) -> tuple[dict[str, object], str]:
    """What a JSON file holds by record, and a hash of it: an object by id or image path, or a list (or JSON
    Lines) of objects each with an `id` or an `image`.

    Raises ValueError for anything else, and for a record that comes twice.
    """
    data = read_bytes(path, what)
    found: dict[str, object] = {}
    for key, value in _pairs(data, Path(path), what):
        if key in found:
            raise ValueError(f"{path}: {key!r} occurs twice; {what} must be given once a record")
        found[key] = value
    if not found:
        raise ValueError(f"{path} holds no {what}")
    return found, fingerprint_of(data)


def read_bytes(path: str | Path, what: str) -> bytes:
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no file of {what} {path}")
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; {what} have at most {_MAX_BYTES}")
    return path.read_bytes()


def fingerprint_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _pairs(data: bytes, path: Path, what: str) -> Iterator[tuple[str, object]]:
    try:
        if path.suffix == ".jsonl":
            whole: object = [loads(line) for line in data.splitlines() if line.strip()]
        else:
            whole = loads(data)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None
    if isinstance(whole, dict):
        yield from whole.items()
        return
    if not isinstance(whole, list):
        raise ValueError(f"{path} must hold {what} by record, got {type(whole).__name__}")
    for place, one in enumerate(whole):
        key = (
            (one.get("id") if one.get("id") is not None else one.get("image"))
            if isinstance(one, dict)
            else None
        )
        if key is None:
            raise ValueError(f"{path}: entry {place} must be an object with the `id` or `image` of a record")
        yield str(key), one
