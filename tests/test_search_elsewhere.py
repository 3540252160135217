"""`llava-kd ablate --with`: seeds and arms of one grid that two machines have trained, brought together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_grids import FakeRuns, edit, write_grid

from llava_kd.cli import main

ARMS = {"AA": ["A", "A"], "AB": ["A", "B"], "BB": ["B", "B"]}
SCORES = {"AA": (0.5, 0.6), "AB": (0.7, 0.75), "BB": (0.65, 0.8)}
SLICES = {"evaluate": {"every": 5, "slices": {"val": {"data": "v.json"}}}}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRuns:
    runs = FakeRuns().install(monkeypatch)
    runs.accuracy = lambda arm, seed: SCORES[arm][seed]
    runs.curve = lambda tree, step: step / 100 + tree.get("seed", 0) / 10
    runs.operations = 3.0
    return runs


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    return write_grid(tmp_path, ARMS, common=SLICES)


def at(grid: Path, name: str) -> Path:
    return grid.parent / name / "results.json"


def run(grid: Path, name: str, *words: str) -> int:
    return main(["ablate", str(grid), f"--out={grid.parent / name}", *words])


def test_two_machines_find_what_one_finds(grid: Path, fake: FakeRuns) -> None:
    assert run(grid, "whole") == 0
    assert run(grid, "one", "--seeds=0") == 0
    fake.trained.clear()
    assert run(grid, "two", f"--with={at(grid, 'one')}") == 0
    assert sorted(fake.labels()) == ["A1", "A1", "B1", "B1", "B1"], "seed 0 is not trained again"
    assert json.loads(at(grid, "two").read_text()) == json.loads(at(grid, "whole").read_text())
    for name in ("results.md", "results.html"):
        assert (grid.parent / "two" / name).read_text() == (grid.parent / "whole" / name).read_text()


def test_what_was_brought_stays_without_being_named_again(grid: Path, fake: FakeRuns) -> None:
    assert run(grid, "one", "--arms=BB", "--seeds=1") == 0
    assert run(grid, "two", "--arms=AA", f"--with={at(grid, 'one')}") == 0
    at(grid, "one").unlink()
    fake.scored.clear()
    assert run(grid, "two") == 0
    assert fake.scored == ["AB 0", "BB 0", "AB 1"]


def test_a_dry_run_prices_what_is_left_and_keeps_nothing(grid: Path, fake: FakeRuns, capsys) -> None:
    assert run(grid, "one", "--arms=BB", "--seeds=1") == 0
    capsys.readouterr()
    assert run(grid, "two", f"--with={at(grid, 'one')}", "--dry_run") == 0
    assert "5 pairs of an arm and a seed: 8 stages (10 without sharing)" in capsys.readouterr().out
    assert not (grid.parent / "two").exists()
    assert run(grid, "one", "--dry_run", "--arms=BB", "--seeds=1") == 0
    assert "0 new" in capsys.readouterr().out


def _another_rate(grid: Path) -> None:
    edit(grid, lambda tree: tree["common"].update({"optim.lr": 0.5}))


def _another_name(grid: Path) -> None:
    edit(grid, lambda tree: tree.update(name="other"))


def _another_test(grid: Path) -> None:
    (grid.parent / "test.json").write_text("[{}]")


def _one_test_more(grid: Path) -> None:
    edit(grid, lambda tree: tree["tests"].update(more=tree["tests"]["test"]))


def _another_teacher(grid: Path) -> None:
    (grid.parent / "teacher" / "config.json").write_text("{}")


def _without_runs(grid: Path) -> None:
    results = json.loads(at(grid, "one").read_text())
    del results["finished"]
    at(grid, "one").write_text(json.dumps(results))


def _torn(grid: Path) -> None:
    at(grid, "one").write_text(at(grid, "one").read_text()[:-20])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_another_rate, "arm AA, seed 0 was trained with other settings"),
        (_another_name, "holds results of the ablation grid, not of other"),
        (_another_test, "another"),
        (_one_test_more, "has the tests test; "),
        (_another_teacher, "other files of the model"),
        (_without_runs, "does not hold its single runs"),
        (_torn, "is not a results file"),
        (lambda grid: at(grid, "one").unlink(), "there is no results file"),
    ],
)
def test_results_of_another_grid_are_refused_by_name(
    grid: Path, fake: FakeRuns, capsys, change: Callable[[Path], object], said: str
) -> None:
    (grid.parent / "teacher").mkdir()
    assert run(grid, "one", "--seeds=0") == 0
    change(grid)
    capsys.readouterr()
    fake.trained.clear()
    assert run(grid, "two", f"--with={at(grid, 'one')}") == 2
    error = capsys.readouterr().err
    assert said in error
    assert str(at(grid, "one")) in error
    assert fake.trained == []
    assert not (grid.parent / "two" / "elsewhere").exists()
