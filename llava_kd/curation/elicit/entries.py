"""Records that a model is to answer: entries that end with a question, or whose answers are given anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from llava_kd.data.sources.conversation import TALKS, Record, Turn, read_record, unique_ids
from llava_kd.data.sources.entries import read_entries
from llava_kd.evaluation.generation.questions import Question, check_questions, image_path, questions_of

OPEN = "\u2026"  # stands where the answer will
_SPEAKERS = {"user": "human", "assistant": "gpt"}
Which = Literal["open", "all", "any", "last"]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A record and the questions of it that are asked; their answers take the place of its own, in order.

    `origin` is what the record says of where it came from, where a model has written it.
    """

    record: Record
    questions: tuple[Question, ...]
    origin: object = None

    @property
    def is_open(self) -> bool:
        return self.record.turns[-1].text == OPEN

    def asking(self, text: str) -> Asked:
        """The same record with other words for its last question."""
        turns = list(self.record.turns)
        turns[-2] = Turn("user", text)
        return replace(self, record=replace(self.record, turns=tuple(turns)))

    def entry(self, answers: Sequence[str], elicited: Mapping[str, object]) -> dict[str, object]:
        """LLaVA JSON with these answers; the last of its turns where fewer are asked than it has."""
        own = [i for i, turn in enumerate(self.record.turns) if turn.role == "assistant"]
        turns = list(self.record.turns)
        for place, text in zip(own[-len(answers) :], answers, strict=True):
            turns[place] = Turn("assistant", text)
        before = {} if self.origin is None else {"of": self.origin}
        return entry_of(replace(self.record, turns=tuple(turns)), {**elicited, **before})


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """A record that gave no data, and why."""

    id: str
    reason: str


def entry_of(record: Record, elicited: Mapping[str, object]) -> dict[str, object]:
    """LLaVA JSON of a record, with where it comes from."""
    images: dict[str, object] = {}
    if record.images:
        images = {"image": record.images[0]} if len(record.images) == 1 else {"images": list(record.images)}
    talk = [{"from": _SPEAKERS.get(turn.role, turn.role), "value": turn.text} for turn in record.turns]
    return {**record.extra, "id": record.id, **images, "conversations": talk, "elicited": dict(elicited)}


def read_records(path: str | Path) -> list[tuple[Record, object]]:
    """Of a LLaVA file, each with its origin. A talk that ends with a question has `OPEN` as its answer; a
    record that cannot be used has a fault.
    """
    entries = list(read_entries(Path(path)))
    records = unique_ids(read_record(_closed(raw), place) for place, raw in enumerate(entries))
    origins = (raw.get("elicited") if isinstance(raw, dict) else None for raw in entries)
    return list(zip(records, origins, strict=True))


def read_asked(
    path: str | Path, *, image_root: str | Path | None, follow_symlinks: bool, which: Which
) -> tuple[list[Asked], list[Dropped]]:
    """Records with what is asked of each: the question that stands `open`, `all` with an answer, `any` or
    the `last`, answered or not.

    What cannot be asked is dropped with its reason. Raises ValueError where nothing is left.
    """
    path = Path(path)
    root = Path(image_root) if image_root is not None else path.parent
    asked, dropped = [], []
    for record, origin in read_records(path):
        try:
            questions = _questions(record, root, follow_symlinks, which)
        except ValueError as error:
            dropped.append(Dropped(id=record.id, reason=str(error)))
            continue
        asked.append(Asked(record=record, questions=tuple(questions), origin=origin))
    if not asked:
        first = dropped[0].reason if dropped else "it is empty"
        raise ValueError(f"{path} has no usable record: {first}")
    check_questions([question for one in asked for question in one.questions], path)
    return asked, dropped


def _questions(record: Record, root: Path, follow_symlinks: bool, which: Which) -> list[Question]:
    if record.fault:
        raise ValueError(record.fault)
    owner = f"record {record.id!r}"
    images = [image_path(root, name, owner=owner, follow_symlinks=follow_symlinks) for name in record.images]
    questions = questions_of(record, images, owner)
    is_open = record.turns[-1].text == OPEN
    if which == "open" and not is_open:
        raise ValueError(f"{owner} is answered already; --relabel writes its answers again")
    if which == "all" and is_open:
        raise ValueError(f"{owner} ends with a question; let a model label it first")
    # What stands before an open question is its own; the true answers stay.
    return questions[-1:] if which in ("open", "last") else questions


def _closed(raw: object) -> object:
    """The entry with an answer in the place of the one that is missing."""
    if not isinstance(raw, dict):
        return raw
    key = next((key for key in TALKS if raw.get(key)), None)
    talk = raw.get(key) if key is not None else None
    if not isinstance(talk, list) or not isinstance(talk[-1], dict):
        return raw
    if (talk[-1].get("from") or talk[-1].get("role")) not in ("human", "user"):
        return raw
    return {**raw, key: [*talk, {"from": "gpt", "value": OPEN}]}
