"""The page of any runs: finished, going on, half-written, scored, several."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from test_evaluation_report import HOSTILE, write_model

from llava_kd.cli import main
from llava_kd.evaluation.report.stage_runs import differing, find_runs


def write_run(
    directory: Path, *, steps: int = 40, weight: float = 1.0, finished: bool = True, **more: float
) -> Path:
    directory.mkdir(parents=True)
    rows = [
        {"step": k, "loss": 3.0 / k, "cross_entropy": 3.0 / k, "samples_per_s": 100.0, **more}
        for k in range(1, steps + 1)
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "config.yaml").write_text(
        f"output_dir: {directory}\nteacher: null\nobjective:\n  cross_entropy: {{weight: {weight}}}\n"
    )
    if finished:
        record = {
            "completed": True,
            "steps": steps,
            "commit": "abc",
            "versions": {"torch": "2"},
            "parent": None,
        }
        (directory / "run.json").write_text(json.dumps(record))
    return directory


class Balanced(HTMLParser):
    """Every element is closed, in turn; `texts` are those of the table cells."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag not in ("meta", "img", "input", "line", "polyline", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "polyline", "circle"):
            assert self.open.pop() == tag


def page(*words: str | Path) -> str:
    assert main(["report", *map(str, words)]) == 0
    out = next((str(w).removeprefix("--out=") for w in words if str(w).startswith("--out=")), None)
    text = (Path(out) if out else Path(words[0]) / "report.html").read_text()
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert "http://" not in text
    assert "<script" not in text
    return text


def rows_of(text: str, title: str) -> list[list[str]]:
    section = text.split(f"<h2>{title}</h2>")[1].split("<h2>")[0] if title else text.split("<h2>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", section, re.S)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in rows]


def test_one_run_is_a_page_of_what_it_reached(tmp_path: Path, capsys) -> None:
    run = write_run(
        tmp_path / "stage1", **{"slice/val": 0.5, "loss/val/picture_gain": 0.2, "loss/seconds": 1.0}
    )
    text = page(run)
    head, row = rows_of(text, "")
    assert dict(zip(head, row, strict=True)) == {
        "run": "stage1",
        "state": "finished",
        "steps": "40",
        "last loss": "0.075",
        "samples/s": "100",
    }
    assert "rise of the loss with another picture" in text
    assert "slice/val" in text
    assert "loss/seconds" not in text
    assert "Settings that differ" not in text
    assert "stage1: finished" in capsys.readouterr().out


def test_runs_are_told_apart_and_their_differences_shown(tmp_path: Path) -> None:
    for arm, weight in (("a", 1.0), ("b", 0.5)):
        write_run(tmp_path / arm / "stage1", weight=weight)
    text = page(tmp_path, f"--out={tmp_path / 'all.html'}")
    assert [row[0] for row in rows_of(text, "")] == ["run", "a/stage1", "b/stage1"]
    assert rows_of(text, "Settings that differ") == [
        ["setting", "a/stage1", "b/stage1"],
        ["objective.cross_entropy.weight", "1.0", "0.5"],
    ]
    chart = text.split("cross_entropy over optimiser steps</title>")[1].split("</svg>")[0]
    assert 'class="curve run0 only0"' in chart
    assert 'class="curve run1 only1"' in chart


def test_a_run_that_goes_on_is_shown_as_far_as_it_is(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=7, finished=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    assert rows_of(page(run), "")[1][:3] == ["run", "at step 7", "7"]
    (empty := write_run(tmp_path / "empty", steps=0, finished=False)).joinpath("metrics.jsonl").write_text("")
    assert rows_of(page(empty), "")[1][:4] == ["empty", "before its first step", "0", "-"]


def test_scored_runs_show_scores_and_answers(tmp_path: Path) -> None:
    for name, marks in (("one", "1100"), ("two", "1110")):
        write_model(write_run(tmp_path / name) / "eval", marks)
    text = page(tmp_path)
    scores = rows_of(text, "Scores")
    assert scores[0][:3] == ["%", "questions", "all"]
    assert [row[:3] for row in scores[1:]] == [["one, eval", "4", "50.0"], ["two, eval", "4", "75.0"]]
    first = text.split('<div class="example">')[1]
    assert first.count('class="right"') == 1  # the one question that divides them comes first
    assert first.count('class="wrong"') == 1
    assert HOSTILE not in text


def test_names_and_settings_are_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / "<b>x")
    (run / "config.yaml").write_text(f"seed: '{HOSTILE}'\n")
    text = page(run)
    assert "<b>x" not in text
    assert HOSTILE not in text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", b"a: [", "config.yaml must be the settings of a run (while parsing"),
        ("config.yaml", b"", "config.yaml must be the settings of a run; got None"),
        ("config.yaml", b"- 1", "config.yaml must be the settings of a run; got [1]"),
        ("run.json", b"{", "run.json must be JSON, and is cut or damaged ("),
        ("run.json", b"[]", "run.json must hold a JSON object, got []"),
        ("metrics.jsonl", b"x\n", "line 1 is not JSON"),
        ("metrics.jsonl", b"\xff\0\n", "line 1 is not JSON"),
        ("metrics.jsonl", b"null\n", "line 1 holds no figures"),
        ("eval/summary.json", b'{"accuracy": 0', "eval/summary.json must be JSON, and is cut or damaged ("),
        (
            "eval/summary.json",
            b"{}",
            "eval/summary.json must hold accuracy, by_type and count as `llava-kd eval`",
        ),
        ("eval/summary.json", b'{"accuracy": "x", "by_type": {}, "count": 1}', "must hold accuracy, by_type"),
        ("eval/summary.json", b'{"accuracy": 1, "by_type": [], "count": 1}', "must hold accuracy, by_type"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, message: str
) -> None:
    path = write_run(tmp_path / "r") / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    assert main(["report", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert str(path) in said
    assert said.count("\n") == 1


def test_a_folder_without_a_run_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "is no run and holds none" in capsys.readouterr().err


def test_a_page_that_is_a_folder_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, page = write_run(tmp_path / "r"), tmp_path / "page.html"
    page.mkdir()
    assert main(["report", str(run), "--out", str(page)]) == 2
    assert f"llava-kd report: {page}: Is a directory; a folder stands where" in capsys.readouterr().err


def test_scores_of_benchmarks_in_a_run_do_not_stop_its_report(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r")
    for name, tree in (("", {"model": "r", "values": {"gqa": 50.0}}), ("gqa", {"benchmark": "gqa"})):
        (run / "eval" / name).mkdir(parents=True)
        (run / "eval" / name / "summary.json").write_text(json.dumps(tree))
    assert main(["report", str(run)]) == 0
    assert find_runs([run])[0].scores == {}


def test_a_page_needs_a_run(capsys) -> None:
    assert main(["report"]) == 2
    assert "name a run" in capsys.readouterr().err


def test_a_run_named_twice_is_one(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert len(find_runs([run, tmp_path, run])) == 1
    assert differing(find_runs([run])) == {}


def test_a_real_run_is_a_page(stage, capsys) -> None:
    config = stage("run", max_steps=2)
    assert main(["train", str(config)]) == 0
    text = page(config.with_suffix(""))
    assert "visual_kl over optimiser steps" in text
    assert "teacher_better" in text
