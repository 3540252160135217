"""LLaVA records of a table: a row names a picture, a question about it and the answer.

Tables are CSV (standard library), JSON Lines with flat rows, as `metadata.jsonl` of an image folder has, and
XLSX (openpyxl).
"""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_kd.data.sources.conversation import IMAGE_PLACEHOLDER, TALKS

TABLES = (".csv", ".tsv", ".xlsx")
MAX_BYTES = 512 << 20  # of a table once it is unpacked
# What a column may be called, in this order; `file_name` and `text` are those of image folders.
ALIASES = {
    "image": ("image", "file_name", "filename", "picture", "photo"),
    "question": ("question", "prompt", "instruction"),
    "answer": ("answer", "text", "caption", "response", "label"),
}

_LAST = "\U00100002"  # a row that is put behind a table: it is the last one if no cell takes it in
_LISTED = "\U00100003"  # before what a line of JSON has in the place of a text
_SHOWN = 40

Row = tuple[int, dict[str, str]]  # its number in the file, as a spreadsheet shows it, and its cells


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which column holds what; `question` may be one for all rows instead, `asked`."""

    image: str
    answer: str
    question: str | None = None
    asked: str | None = None


def is_table(path: Path) -> bool:
    return path.suffix.lower() in TABLES or (path.suffix.lower() == ".jsonl" and _is_flat(path))


def read_rows(path: Path) -> tuple[list[str], list[Row]]:
    """The names of the columns, and the rows that hold anything.

    Raises ValueError for a file that is missing, too large, not of its kind, or has no row.
    """
    if not path.is_file():
        raise ValueError(f"no table {path}; give a .csv, .xlsx or LLaVA .json file")
    _bounded(path, path.stat().st_size)
    kind = path.suffix.lower()
    if kind == ".jsonl":
        names, rows = _json_lines(path)
    else:
        cells = _xlsx(path) if kind == ".xlsx" else _csv(path)
        names, rows = _named(path, cells)
    if not rows:
        raise ValueError(f"{path} has the columns {', '.join(names)} and no row below them")
    return names, rows


def choose_columns(
    path: Path, names: Sequence[str], chosen: Mapping[str, str], asked: str | None = None
) -> Columns:
    """Which of the columns `names` hold image, question and answer.

    `chosen` names some of them; the others go by `ALIASES`, whatever their case. `asked` is the question of
    every row where no column holds one. Raises ValueError that says which columns came.
    """
    came = ", ".join(names)
    for role, name in chosen.items():
        if role not in ALIASES:
            raise ValueError(f"--columns takes {', '.join(ALIASES)}; got {role}={name}")
        if name not in names:
            raise ValueError(f"{path} has no column {name!r} for the {role}; its columns are {came}")
    lowered = {name.strip().lower(): name for name in reversed(names)}
    found = {
        role: chosen.get(role) or next((lowered[a] for a in aliases if a in lowered), None)
        for role, aliases in ALIASES.items()
    }
    image, answer = found["image"], found["answer"]
    lacking = [role for role in ALIASES if found[role] is None and not (role == "question" and asked)]
    if image is None or answer is None or lacking:
        hint = (
            "" if lacking != ["question"] else ', or ask the same of every picture: --question "What is it?"'
        )
        raise ValueError(
            f"{path} has no column for {' and '.join(lacking)}; its columns are {came}. Name them image, "
            f"question and answer, or say which they are: --columns image={names[0]},...{hint}"
        )
    if asked is not None and found["question"] is not None:
        raise ValueError(
            f"{path} has the questions in its column {found['question']}, and --question gives one for all; "
            "leave one of them out"
        )
    return Columns(image=image, answer=answer, question=found["question"], asked=asked)


def to_records(rows: Sequence[Row], columns: Columns) -> tuple[list[dict], list[str]]:
    """LLaVA entries with the row as id; and of the rows that lack something, a line each."""
    records, faults = [], []
    for number, row in rows:
        image, answer = row.get(columns.image, ""), row.get(columns.answer, "")
        question = row.get(columns.question, "") if columns.question else columns.asked or ""
        cells = {columns.image: image, columns.question or "question": question, columns.answer: answer}
        if empty := [name for name, cell in cells.items() if not cell.strip()]:
            faults.append(f"row {number} has no {' and no '.join(empty)}")
            continue
        if listed := [name for name, cell in cells.items() if cell.startswith(_LISTED)]:
            shown = cells[listed[0]].removeprefix(_LISTED)[:_SHOWN]
            faults.append(
                f"row {number} must have one text as {listed[0]}, got {shown}; write a row for each"
            )
            continue
        text = question.replace(IMAGE_PLACEHOLDER, "").strip()
        said = [
            ("human", f"{IMAGE_PLACEHOLDER}\n{text}"),
            ("gpt", answer.replace(IMAGE_PLACEHOLDER, "").strip()),
        ]
        records.append(
            {
                "id": f"row{number}",
                "image": image.strip(),
                "conversations": [{"from": who, "value": value} for who, value in said],
            }
        )
    return records, faults


def _bounded(path: Path, size: int) -> None:
    if size > MAX_BYTES:
        raise ValueError(
            f"{path} is {size >> 20} MB, and a table may have {MAX_BYTES >> 20} MB; write it as LLaVA JSON "
            "Lines (data/README.md)"
        )


def _csv(path: Path) -> list[list[str]]:
    """By the delimiter that most of its first line is cut by."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} must be UTF-8 text, but byte {error.start} is not; save it as `CSV UTF-8`"
        ) from None
    first = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=first.count)
    try:
        *cells, last = csv.reader(io.StringIO(f"{text}\n{_LAST}", newline=""), delimiter=delimiter)
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV file: {error}") from None
    if last != [_LAST]:
        begun = next((cell for cell in reversed(last) if _LAST in cell), "")
        raise ValueError(
            f"{path} has a cell whose double quote is never closed, so it takes in all rows below: "
            f"{begun[:_SHOWN]!r}; close it, or write a quote of the text as two"
        )
    return cells


def _xlsx(path: Path) -> list[list[str]]:
    """Of its first sheet."""
    try:
        import openpyxl
    except ImportError as error:
        raise ValueError(
            f"{path}: .xlsx needs openpyxl: pip install 'llava_kd[xlsx]'; or save the sheet as CSV"
        ) from error
    try:
        with zipfile.ZipFile(path) as file:
            _bounded(path, sum(part.file_size for part in file.infolist()))
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        cells = [["" if c is None else str(c) for c in row] for row in book.worksheets[0].values]
        book.close()
    except (zipfile.BadZipFile, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as .xlsx: {error}; save it again, or as CSV") from None
    return cells


def _named(path: Path, cells: list[list[str]]) -> tuple[list[str], list[Row]]:
    head = next((i for i, row in enumerate(cells) if any(cell.strip() for cell in row)), None)
    if head is None:
        raise ValueError(f"{path} is empty; its first row names the columns: image, question, answer")
    names = [name.strip() for name in cells[head]]
    if doubled := sorted({name for name in names if name and names.count(name) > 1}):
        raise ValueError(f"{path} has the column {', '.join(doubled)} twice; rename one")
    rows = []
    for number, row in enumerate(cells[head + 1 :], start=head + 2):
        if beyond := [cell for cell in row[len(names) :] if cell.strip()]:
            raise ValueError(
                f"{path}, row {number}, has {len(row)} cells under {len(names)} columns: "
                f"{beyond[0][:_SHOWN]!r} would be lost; put a text that holds the delimiter in double quotes"
            )
        if any(cell.strip() for cell in row):
            rows.append((number, dict(zip(names, row, strict=False))))
    return [name for name in names if name], rows


def _json_lines(path: Path) -> tuple[list[str], list[Row]]:
    rows: list[Row] = []
    names: dict[str, None] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            tree = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}, is not JSON: {error}") from None
        if not isinstance(tree, dict):
            raise ValueError(f'{path}, line {number}, must be an object such as {{"file_name": ...}}')
        rows.append((number, {str(key): _cell(value) for key, value in tree.items() if value is not None}))
        names |= dict.fromkeys(map(str, tree))
    return list(names), rows


def _cell(value: object) -> str:
    return f"{_LISTED}{value}" if isinstance(value, list | dict) else str(value)


def _is_flat(path: Path) -> bool:
    """Whether its first line is a row and no conversation."""
    try:
        with path.open("rb") as stream:
            first = json.loads(next((line for line in stream if line.strip()), b"{}"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(first, dict) and bool(first) and not any(key in first for key in TALKS)
