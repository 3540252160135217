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


def test_two_ranks_write_the_rationales_that_one_does(
    shapes_dir: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    names = [raw["id"] for raw in json.loads((shapes_dir / "test.json").read_text())]
    graphs = tmp_path / "graphs.json"
    colours = {"circle": "red", "star": "blue"}
    objects = [{"name": name, "attributes": {"colour": colour}} for name, colour in colours.items()]
    graphs.write_text(json.dumps({name: {"objects": objects} for name in names}))
    words = ["data", "rationale", "--data", str(shapes_dir / "test.json"), "--scene_graphs", str(graphs)]
    words += [
        "--model",
        str(teacher_dir),
        "--batch_size=2",
        "--max_new_tokens=4",
        "--device=cpu",
        "--prompt=",
    ]
    made = []
    for count in (1, 2):
        out = tmp_path / f"out{count}"
        told = [*words, "--out", str(out)]
        ended = ranks.Ranks(told, tmp_path / f"first{count}", ranks=count).wait()
        assert set(ended.codes) == {2}, ended.log  # random weights write no rationale
        path = out / "answers0" / "answers.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for k, line in enumerate(lines):
            line["answer"] = f"The circle is {'red' if k % 2 else 'blue'}.\nAnswer: circle"
            line.pop("cut", None)
        path.write_text("".join(json.dumps(one) + "\n" for one in lines))
        run(told, tmp_path / f"second{count}", count)
        files = [out / "records.json", out / "dropped.jsonl", out / "answers1" / "answers.jsonl"]
        made.append([path.read_bytes() for path in files])
    assert made[0] == made[1]
    assert len(json.loads(made[0][0])) == 3
