"""MMBench and MMBench-CN: circular accuracy on DEV, which carries its answers, and the upload for the server.

In the 20230712 release ("legacy") the rotations of a question are rows of their own, index + k * 1,000,000.
"""

from __future__ import annotations

import base64
import binascii
import csv
import io
import sys
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from llava_kd.evaluation.benchmarks.base import (
    LETTER,
    Answers,
    Benchmark,
    Item,
    Quirks,
    Score,
    mean,
    missing_note,
    need,
    read_text,
    with_image,
)
from llava_kd.evaluation.benchmarks.paper.xlsx import write_xlsx
from llava_kd.evaluation.generation.questions import Question
from llava_kd.evaluation.scorers.choice import mmbench_option

LETTERS = "ABCD"
# "Please answer with the option's letter directly."
LETTER_CN = "\n\u8bf7\u76f4\u63a5\u56de\u7b54\u9009\u9879\u5b57\u6bcd\u3002"
ROTATION = 1_000_000
_NOT_UPLOADED = ("hint", "category", "source", "image", "comment", "l2-category")
# What pandas.read_table takes for a missing value by default.
_PANDAS_MISSING = frozenset(
    ["#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A",
     "NA", "NULL", "NaN", "None", "n/a", "nan", "null", "none"]
)  # fmt: skip

Row = dict[str, str]


def read_rows(root: Path, file: str, benchmark: str) -> list[Row]:
    path = need(root, file, benchmark)
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter="\t")
    columns = reader.fieldnames or ()
    wanted = ("index", "question", "A", "B", "image")
    if lacking := [name for name in wanted if name not in columns]:
        raise ValueError(f"{path} has no column {lacking}; is this a TSV of MMBench?")
    rows = list(reader)
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise ValueError(
                f"{path}, row {number} must have {len(columns)} cells, as the header; fetch the file again"
            )
        if not row["index"].isdecimal():
            raise ValueError(f"{path}, row {number}: index must be a whole number, got {row['index'][:60]!r}")
    return rows


def is_missing(cell: str | None, quirks: Quirks) -> bool:
    return not cell or (quirks.mmbench_stop_at_none and cell in _PANDAS_MISSING)


def asked_options(row: Row, quirks: Quirks) -> dict[str, str]:
    """Options in the prompt: up to the first missing one, as LLaVA does."""
    options: dict[str, str] = {}
    for letter in LETTERS:
        text = row.get(letter)
        if text is None or is_missing(text, quirks):
            break
        options[letter] = text
    return options


def read(root: Path, quirks: Quirks, *, name: str, file: str, suffix: str) -> list[Question]:
    rows = read_rows(root, file, name)
    pictures = {row["index"]: row["image"] for row in rows}
    questions = []
    for row in rows:
        text = row["question"]
        if not is_missing(row.get("hint"), quirks):
            text = f"{row['hint']}\n{text}"
        for letter, option in asked_options(row, quirks).items():
            text += f"\n{letter}. {option}"
        picture = row["image"]
        if len(picture) < 64:  # the index of the row that carries the picture
            picture = pictures.get(picture, "")
        try:
            data = base64.b64decode(picture, validate=True)
        except binascii.Error:
            data = b""  # no picture: the question is named when it is asked
        questions.append(Question(id=row["index"], text=with_image(text + suffix), images=(data,)))
    return questions


def score(
    root: Path, questions: Sequence[Question], answers: Answers, quirks: Quirks, *, name: str, file: str
) -> Score:
    """A question is right when all its rotations are; `vanilla` counts the unrotated rows alone."""
    rows = read_rows(root, file, name)
    if unlabelled := [row["index"] for row in rows if not row.get("answer")]:
        raise ValueError(
            f"{root / file} has {len(unlabelled)} rows without an answer, the first is {unlabelled[0]}: "
            "only a DEV file can be scored here"
        )
    items, unread, hidden, chinese = [], 0, 0, 0
    groups: dict[int, list[bool]] = defaultdict(list)
    categories: dict[str, dict[int, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        index, answer = int(row["index"]), answers.get(row["index"], "")
        options = {k: row[k] for k in LETTERS if not is_missing(row.get(k), quirks)}
        reading = mmbench_option(answer, options, chinese=not quirks.mmbench_latin_only)
        chinese += bool(reading) != bool(mmbench_option(answer, options, chinese=quirks.mmbench_latin_only))
        unread += not reading
        hidden += any(row.get(k) in _PANDAS_MISSING for k in LETTERS)
        right = reading == row["answer"]
        groups[index % ROTATION].append(right)
        categories[row.get("category") or "all"][index % ROTATION].append(right)
        item = Item(id=row["index"], answer=answer, reading=reading, truth=row["answer"], score=float(right))
        items.append(item)
    notes = [*missing_note(questions, answers)]
    if unread:
        notes.append(f"no option could be read from {unread} answers; without a judge they count as wrong")
    if hidden:
        how = "left out, as pandas and LLaVA do" if quirks.mmbench_stop_at_none else "kept"
        notes.append(f"{hidden} rows have an option such as None or NA; it is {how}")
    if chinese:
        notes.append(f"{chinese} answers are read differently with Chinese punctuation and without")
    circular = 100 * mean([float(all(rights)) for rights in groups.values()])
    vanilla = 100 * mean([item.score for item in items if int(item.id) < ROTATION])
    by_category = {
        category: 100 * mean([float(all(rights)) for rights in found.values()])
        for category, found in sorted(categories.items())
    }
    parts = {"circular": circular, "vanilla": vanilla, **by_category}
    return Score(value=circular, parts=parts, items=tuple(items), notes=tuple(notes))


def upload(
    root: Path,
    questions: Sequence[Question],
    answers: Answers,
    quirks: Quirks,
    out_dir: Path,
    *,
    name: str,
    file: str,
) -> Path:
    """The server's xlsx: LLaVA's columns, with the prediction as the seventh."""
    rows = read_rows(root, file, name)
    columns = [column for column in rows[0] if column not in _NOT_UPLOADED]
    columns.insert(6, "prediction")
    table: list[list[str | int | None]] = [list(columns)]
    for row in rows:
        cells = {**row, "prediction": answers.get(row["index"])}
        table.append([int(cells[c]) if c == "index" else cells[c] or None for c in columns])
    path = out_dir / f"upload_{name}.xlsx"
    write_xlsx(path, table)
    return path


def _benchmark(name: str, column: str, file: str, suffix: str, *, has_answers: bool) -> Benchmark:
    return Benchmark(
        name=name,
        column=column,
        files=(file,),
        images=file,
        num_questions=None,
        max_new_tokens=1024,
        read=partial(read, name=name, file=file, suffix=suffix),
        score=partial(score, name=name, file=file) if has_answers else None,
        upload=partial(upload, name=name, file=file),
        notes="" if has_answers else "scored by the MMBench server",
    )


DEV = _benchmark("mmbench", "MMB", "mmbench/MMBench_DEV_EN_legacy.tsv", LETTER, has_answers=True)
DEV_CN = _benchmark(
    "mmbench_cn", "MMB-CN", "mmbench_cn/MMBench_DEV_CN_legacy.tsv", LETTER_CN, has_answers=True
)
TEST = _benchmark("mmbench_test", "MMB test", "mmbench/MMBench_TEST_EN_legacy.tsv", LETTER, has_answers=False)
TEST_CN = _benchmark(
    "mmbench_cn_test",
    "MMB-CN test",
    "mmbench_cn/MMBench_TEST_CN_legacy.tsv",
    LETTER_CN,
    has_answers=False,
)
