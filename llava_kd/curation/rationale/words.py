"""Evidence in words: what a picture has written in it, and a table of facts."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_kd.curation.rationale.evidence import (
    Check,
    Verdict,
    fingerprint_of,
    of_record,
    read_by_key,
    read_bytes,
)
from llava_kd.curation.spreadsheets import read_rows
from llava_kd.data.sources.conversation import Record
from llava_kd.data.sources.entries import loads

_QUOTED = re.compile(r"[\"\u201c](?P<text>[^\"\u201c\u201d]+)[\"\u201d]")
_WORD = re.compile(r"\w+(?:[.,'\u2019]\w+)*")
NOT = re.compile(
    r"\b(?:not|cannot|no|none|nobody|nothing|nowhere|never|neither|nor|without|\w+n['\u2019]t)\b",
    re.IGNORECASE,
)
NUMBER = re.compile(r"(?<![\w.,])\d+(?:[.,]\d+)*(?!\w)")
NEAR = 0.75  # how alike a misread word and the written one are at least, as difflib says


def words_of(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


@dataclass(frozen=True, kw_only=True)
class WrittenWords:
    """Words that are written in pictures, in reading order. A claim is read by what it quotes."""

    tokens: Mapping[str, Sequence[str]]
    fingerprint: str
    name: str = "OCR tokens"

    @property
    def keys(self) -> Collection[str]:
        return self.tokens.keys()

    def about(self, record: Record) -> Check | None:
        found = of_record(self.tokens, record)
        if found is None:
            return None
        tokens: Sequence[str] = found  # pyright: ignore[reportAssignmentType]
        return lambda claim: check_quotes(claim, tokens)


def read_written_words(path: str | Path) -> WrittenWords:
    """By record a list of words, or an object with `tokens`. ValueError for anything else."""
    by_key, fingerprint = read_by_key(path, "OCR tokens")
    tokens = {}
    for key, raw in by_key.items():
        given = raw.get("tokens", raw.get("ocr_tokens")) if isinstance(raw, Mapping) else raw
        if not isinstance(given, list) or not all(isinstance(token, str) for token in given):
            raise ValueError(f"{path}, record {key!r}: OCR tokens are a list of words, got {str(given)[:80]}")
        tokens[key] = given
    return WrittenWords(tokens=tokens, fingerprint=fingerprint)


def check_quotes(claim: str, tokens: Sequence[str]) -> Verdict | None:
    """Whether all that is quoted is written, word after word; a correction is the one text that is near."""
    quotes = list(_QUOTED.finditer(claim))
    if not quotes or NOT.search(_QUOTED.sub("", claim)):
        return None
    written = [(token, words_of(token)) for token in tokens]
    flat = [word for _, own in written for word in own]
    fact = f"written: {' '.join(tokens)[:200]}"
    wrong = [quote for quote in quotes if not _stands_in(words_of(quote["text"]), flat)]
    if not wrong:
        return Verdict(holds=True, fact=fact)
    correction = claim
    for quote in reversed(wrong):
        near = _near(quote["text"], tokens)
        if near is None:
            return Verdict(holds=False, fact=fact)
        correction = correction[: quote.start("text")] + near + correction[quote.end("text") :]
    return Verdict(holds=False, fact=fact, correction=correction)


def _stands_in(words: Sequence[str], flat: Sequence[str]) -> bool:
    size = len(words)
    return bool(words) and any(flat[k : k + size] == list(words) for k in range(len(flat) - size + 1))


def _near(text: str, tokens: Sequence[str]) -> str | None:
    """The run of as many tokens that is most like a text; None where none, or more than one, is near."""
    size = len(text.split())
    runs = dict.fromkeys(" ".join(tokens[k : k + size]) for k in range(len(tokens) - size + 1))
    close = difflib.get_close_matches(text.lower(), [run.lower() for run in runs], n=2, cutoff=NEAR)
    if len(close) != 1:
        return None
    return next(run for run in runs if run.lower() == close[0])


@dataclass(frozen=True, kw_only=True)
class Fact:
    """`record` is the id or image path of the one that it is about; None: of all."""

    subject: str
    relation: str
    object: str
    record: str | None = None


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A table of facts. A claim is read by the subject and the relation that it names."""

    facts: Sequence[Fact]
    fingerprint: str
    name: str = "facts"

    @property
    def keys(self) -> Collection[str] | None:
        named = [fact.record for fact in self.facts]
        return None if None in named else {key for key in named if key is not None}

    def about(self, record: Record) -> Check | None:
        own = [fact for fact in self.facts if fact.record in (None, record.id, *record.images)]
        if not own:
            return None
        return lambda claim: check_fact(claim, own, self.facts)


_COLUMNS = ("subject", "relation", "object")


def read_facts(path: str | Path) -> Facts:
    """A table or a JSON list of `subject`, `relation`, `object`, and perhaps `record`."""
    path = Path(path)
    data = read_bytes(path, "facts")
    if path.suffix.lower() == ".json":
        try:
            rows = loads(data)
        except ValueError as error:
            raise ValueError(f"{path} {error}") from None
        if not isinstance(rows, list) or not rows:
            raise ValueError(f"{path} must hold a list of facts, got {type(rows).__name__}")
    else:
        rows = [row for _, row in read_rows(path)[1]]
    return Facts(
        facts=[_fact(row, k, path) for k, row in enumerate(rows, start=1)], fingerprint=fingerprint_of(data)
    )


def _fact(row: object, number: int, path: Path) -> Fact:
    values = [str(row.get(column) or "").strip() for column in _COLUMNS] if isinstance(row, Mapping) else [""]
    if not all(values):
        raise ValueError(f"{path}: fact {number} must have {', '.join(_COLUMNS)}; got {str(row)[:80]}")
    assert isinstance(row, Mapping)
    record = row.get("record")
    subject, relation, thing = values
    return Fact(subject=subject, relation=relation, object=thing, record=str(record) if record else None)


def check_fact(claim: str, own: Iterable[Fact], every: Iterable[Fact]) -> Verdict | None:
    """Whether a claim that names one subject and one relation of a table names the object too.

    Where it names an object of another subject, or another number, in its place, that is corrected.
    """
    if NOT.search(claim):
        return None
    named = [fact for fact in own if _find(fact.subject, claim) and _find(fact.relation, claim)]
    if len({(fact.subject.lower(), fact.relation.lower()) for fact in named}) != 1:
        return None
    subject, relation = named[0].subject, named[0].relation
    objects = list(dict.fromkeys(fact.object for fact in named))
    told = f"{subject}, {relation}: {', '.join(objects)}"
    rest = claim
    for known in sorted({fact.subject for fact in named} | {fact.relation for fact in named}, key=len):
        for found in _find(known, claim):  # covered, so that places stay
            rest = rest[: found.start()] + "\0" * (found.end() - found.start()) + rest[found.end() :]
    is_said = any(_find(one, rest) for one in objects)
    others = {fact.object for fact in every if fact.relation.lower() == relation.lower()} - set(objects)
    places = {(one.start(), one.end()) for other in others for one in _find(other, rest)}
    if is_said:  # with another beside it: which is meant?
        return None if places else Verdict(holds=True, fact=told)
    if not places and all(NUMBER.fullmatch(one) for one in objects):
        places = {found.span() for found in NUMBER.finditer(rest)}
    places = {one for one in places if not any(_is_inside(one, other) for other in places)}
    if not places:
        return None
    correction = ""
    if len(places) == 1 and len(objects) == 1:
        ((start, end),) = places
        correction = claim[:start] + objects[0] + claim[end:]
    return Verdict(holds=False, fact=told, correction=correction)


def _find(text: str, claim: str) -> list[re.Match[str]]:
    """Where a text stands in a claim as whole words."""
    return list(re.finditer(rf"(?<!\w){re.escape(text)}(?!\w)", claim, re.IGNORECASE))


def _is_inside(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one != other and other[0] <= one[0] and one[1] <= other[1]
