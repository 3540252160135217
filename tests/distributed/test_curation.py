"""Scores and answers of two ranks are those of one, to the byte, also where one goes on with the other's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import ranks

pytestmark = pytest.mark.distributed


def run(words: list[str], log: Path, count: int) -> None:
    ended = ranks.Ranks(words, log, ranks=count).wait()
    assert set(ended.codes) == {0}, ended.log


def test_two_ranks_choose_what_one_does_and_go_on_with_its_scores(
    stage: Callable[..., Path], student_dir: Path, tmp_path: Path
) -> None:
    config = stage("run", engine="auto")

    def select(out: Path, count: int) -> bytes:
        words = [
            "data",
            "select",
            str(config),
            "--reference",
            str(student_dir),
            "--keep",
            "0.5",
            "--any_reference",
        ]
        run([*words, "--out", str(out)], tmp_path / f"{out.name}-{count}", count)
        return (out / "scores.jsonl").read_bytes() + (out / "chosen.json").read_bytes()

    one, two = tmp_path / "one", tmp_path / "two"
    expected = select(one, 1)
    assert select(two, 2) == expected
    shares = [len((two / "scores" / f"teacher.rank{rank}.jsonl").read_text().splitlines()) for rank in (0, 1)]
    assert min(shares) > 0
    assert sum(shares) == 30
    path = one / "scores" / "teacher.rank0.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:13]))
    assert select(one, 2) == expected


def test_two_ranks_write_what_one_does(shapes_dir: Path, teacher_dir: Path, tmp_path: Path) -> None:
    entries = json.loads((shapes_dir / "test.json").read_text())
    data = tmp_path / "data.json"
    data.write_text(json.dumps(entries))
    words = ["data", "answer", "curate", "--by=likelihood", "--keep=0.5", "--data", str(data), "--device=cpu"]
    words += ["--images", str(shapes_dir), "--model", str(teacher_dir), "--batch_size=2"]
    made = []
    for count in (1, 2):
        out = tmp_path / f"out{count}"
        run([*words, "--out", str(out)], tmp_path / f"log{count}", count)
        made.append((out / "records.json").read_bytes())
    assert made[0] == made[1]
