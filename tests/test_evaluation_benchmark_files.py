"""Files of benchmarks as people have them: other forms are refused by name, never with a traceback."""

from __future__ import annotations

import copy
import csv
import io
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import tiny_benchmarks as tiny

from llava_kd.evaluation.benchmarks.base import Quirks
from llava_kd.evaluation.benchmarks.catalogue import BENCHMARKS
from llava_kd.evaluation.generation.questions import Question

FILES = [(name, file) for name, b in BENCHMARKS.items() for file in b.files if "." in Path(file).name]
WRONG = (None, 3, "x", [], {}, [None], ["x"])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_all(tmp_path_factory.mktemp("data"))


def used(name: str, root: Path) -> list[Question]:
    """All that an evaluation does with the files, but for the answers."""
    benchmark = BENCHMARKS[name]
    questions = benchmark.read(root, Quirks())
    if benchmark.score is not None:
        benchmark.score(root, questions, {}, Quirks())
    if benchmark.upload is not None:
        (root / "upload").mkdir(exist_ok=True)
        answers = {question.id: "yes" for question in questions}
        benchmark.upload(root, questions, answers, Quirks(), root / "upload")
    return questions


def changed(tree: Any, depth: int = 3) -> Iterator[Any]:
    """The tree with one value of another kind, or without it; of its lists and objects the first two."""
    yield from WRONG
    if depth == 0 or not isinstance(tree, (list, dict)):
        return
    for key in range(min(2, len(tree))) if isinstance(tree, list) else list(tree)[:8]:
        for value in changed(tree[key], depth - 1):
            other = copy.copy(tree)
            other[key] = value
            yield other
        other = copy.copy(tree)
        del other[key]
        yield other


def variants(path: Path) -> Iterator[str]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".tsv":
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter="\t"))
        for table in changed(rows, 2):
            if isinstance(table, list) and all(isinstance(row, list) for row in table):
                stream = io.StringIO(newline="")
                csv.writer(stream, delimiter="\t").writerows(table)
                yield stream.getvalue()
        return
    try:
        for tree in changed(json.loads(text)):
            yield json.dumps(tree)
    except json.JSONDecodeError:  # a file of lines
        for rows in changed([json.loads(line) for line in text.splitlines()]):
            yield "".join(json.dumps(row) + "\n" for row in (rows if isinstance(rows, list) else [rows]))


@pytest.mark.parametrize(("name", "file"), FILES)
def test_a_file_of_another_form_is_read_or_refused_by_name(root: Path, name: str, file: str) -> None:
    path = root / file
    whole = path.read_bytes()
    try:
        for text in variants(path):
            path.write_text(text, encoding="utf-8")
            with suppress(ValueError):
                used(name, root)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize(("name", "file"), FILES)
def test_a_file_saved_on_windows_is_the_same(root: Path, name: str, file: str) -> None:
    path = root / file
    whole = path.read_bytes()
    before = used(name, root)
    try:
        path.write_bytes(b"\xef\xbb\xbf" + whole.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
        assert used(name, root) == before
        path.write_bytes(whole.decode().encode("utf-16"))
        with pytest.raises(ValueError, match=f"{path.name} must be a UTF-8 text"):
            used(name, root)
    finally:
        path.write_bytes(whole)


def test_a_row_of_mmbench_that_was_cut_is_named(root: Path) -> None:
    path = root / "mmbench/MMBench_DEV_EN_legacy.tsv"
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[: len(whole) - 40])
        with pytest.raises(ValueError, match=r"legacy.tsv, row 4 must have 14 cells, as the header"):
            used("mmbench", root)
    finally:
        path.write_bytes(whole)
