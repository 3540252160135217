"""What defines a benchmark, and how its files are read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any

from llava_kd.evaluation.generation.questions import Question

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."

JsonDict = dict[str, Any]  # one object of somebody else's file, checked where it is used


@dataclass(frozen=True, kw_only=True)
class Quirks:
    """Flaws of the official code. True reproduces them; the number of affected items is always noted."""

    vqav2_skip_identical: bool = True  # all humans alike: nothing is normalised, "Yes" misses ten "yes"
    mmmu_guess: bool = True  # nothing parsed or several images: a letter is drawn (seed 42), else wrong
    mmbench_stop_at_none: bool = True  # an option "None", "NA" or "nan" ends the options, as pandas reads it
    mmbench_latin_only: bool = False  # Chinese punctuation and script hide the letter (not used by default)
    upload_m4c: bool = True  # VQAv2 and VizWiz uploads through the M4C processor, which splits "'s" off


@dataclass(frozen=True, kw_only=True)
class Item:
    """One scored question: `reading` is what was parsed from the answer, `score` how much it counts."""

    id: str
    answer: str
    reading: str
    truth: str
    score: float


@dataclass(frozen=True, kw_only=True)
class Score:
    """`value` is the figure that the papers report."""

    value: float
    parts: dict[str, float]
    items: tuple[Item, ...]
    notes: tuple[str, ...] = ()


Answers = Mapping[str, str]  # by question id; a missing one counts as wrong and is noted


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One benchmark in the files of the LLaVA ecosystem. Paths are relative to the data root."""

    name: str
    column: str
    files: tuple[str, ...]
    images: str
    num_questions: int | None  # of the published release
    max_new_tokens: int
    read: Callable[[Path, Quirks], list[Question]]
    score: Callable[[Path, Sequence[Question], Answers, Quirks], Score] | None = None
    upload: Callable[[Path, Sequence[Question], Answers, Quirks, Path], Path] | None = None
    notes: str = ""
    other_counts: tuple[int, ...] = field(default=())  # questions in other known releases


def need(root: Path, name: str, benchmark: str) -> Path:
    path = root / name
    if not path.exists():
        raise ValueError(f"{benchmark} needs {path}, which is not there; see eval/README.md for the layout")
    return path


def read_text(path: Path) -> str:
    """Line ends as they are; without the mark that programs of Windows put first."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be a UTF-8 text ({error}); see eval/README.md for the file") from error


def read_json(path: Path, kind: Kind) -> Any:
    try:
        tree = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    return of_kind(tree, kind, str(path))


def read_jsonl(path: Path) -> list[JsonDict]:
    """Objects of a JSON Lines file. ValueError names a broken line."""
    rows = []
    # Not splitlines(): a text may hold U+2028 and its like, which only that would take for line ends.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is not valid JSON: {error}") from error
        rows.append(of_kind(row, dict, f"{path}, line {number}"))
    return rows


NAME = str | int  # an id, as some releases write it in quotes and others not
TRUTH = str | int | list
Kind = type | UnionType
_WORDS: dict[Kind, str] = {
    str: "a text",
    int: "a whole number",
    list: "a list",
    dict: "a JSON object",
    NAME: "a text or a number",
    TRUTH: "a text, a number or a list",
}


def of_kind(value: Any, kind: Kind, what: str) -> Any:
    """`value`, of somebody else's file; ValueError where it is of another kind."""
    if isinstance(value, kind):
        return value
    given = json.dumps(value)
    given = given if len(given) <= 60 else f"{given[:57]}..."
    raise ValueError(f"{what} must be {_WORDS[kind]}, got {given}; is this another release of the file?")


def field_of(row: Any, key: str, path: Path, number: int | str, kind: Kind = NAME) -> Any:
    owner = f"{path}: entry {number}"
    if key not in of_kind(row, dict, owner):
        raise ValueError(f"{owner} has no {key!r}; is this another release of the file?")
    return of_kind(row[key], kind, f"{owner}: {key!r}")


def human_answers(row: JsonDict, path: Path, number: int | str) -> list[str]:
    """The human answers of an annotation: a list of {"answer": ..} or of plain strings."""
    answers = field_of(row, "answers", path, number, list)
    return [
        str(field_of(answer, "answer", path, number) if isinstance(answer, dict) else answer)
        for answer in answers
    ]


def with_image(text: str) -> str:
    return f"<image>\n{text}"


def without_suffix(text: str) -> str:
    """The question without the format instruction at its end."""
    for suffix in (SHORT, LETTER):
        text = text.removesuffix(suffix)
    return text.strip()


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def missing_note(questions: Sequence[Question], answers: Answers) -> tuple[str, ...]:
    """Notes on questions without an answer and on answers without a question."""
    names = {question.id for question in questions}
    notes = []
    if missing := [question.id for question in questions if question.id not in answers]:
        notes.append(f"{len(missing)} questions have no answer and count as wrong, the first is {missing[0]}")
    if extra := [name for name in answers if name not in names]:
        notes.append(f"{len(extra)} answers belong to no question, the first is {extra[0]}")
    return tuple(notes)
