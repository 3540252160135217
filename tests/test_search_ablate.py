"""`llava-kd ablate` with stages that end at once: what is trained, what is shared, what the results say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tiny_grids import FakeRuns, edit, write_grid

from llava_kd.cli import main
from llava_kd.search.findings.statistics import estimate

ARMS = {
    "AA": {"stages": ["A", "A"], "published": 50},
    "AB": {"stages": ["A", "B"], "published": 60},
    "BB": {"stages": ["B", "B"], "published": 55, "what": "taught twice"},
}
# Accuracies by arm: seed 0, seed 1.
SCORES = {"AA": (0.5, 0.6), "AB": (0.7, 0.75), "BB": (0.65, 0.8)}


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    return write_grid(tmp_path, ARMS)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRuns:
    runs = FakeRuns().install(monkeypatch)
    runs.accuracy = lambda arm, seed: SCORES[arm][seed]
    return runs


def results(grid: Path) -> dict:
    return json.loads((grid.parent / "out" / "results.json").read_text())


def refusal(grid: Path, capsys, *words: str) -> str:
    capsys.readouterr()
    assert main(["ablate", str(grid), *words]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    return said


def test_a_shared_stage_is_trained_once(grid: Path, fake: FakeRuns, capsys) -> None:
    assert main(["ablate", str(grid)]) == 0
    assert sorted(fake.labels()) == sorted(2 * ["A0", "A1"] + 3 * ["B0", "B1"])
    assert len(fake.scored) == 6
    said = capsys.readouterr().out
    assert "[16 of 16]" in said
    assert "nothing left" in said
    fake.trained.clear()
    assert main(["ablate", str(grid)]) == 0
    assert fake.trained == []
    assert len(fake.scored) == 6


def test_an_arm_points_to_its_stages(grid: Path, fake: FakeRuns) -> None:
    assert main(["ablate", str(grid)]) == 0
    where = grid.parent / "out" / "arms" / "AB" / "seed1"
    arm = json.loads((where / "arm.json").read_text())
    assert [stage["label"] for stage in arm["stages"]] == ["A", "B"]
    assert [stage["shared_with"] for stage in arm["stages"]] == [["AA"], []]
    for stage in arm["stages"]:
        assert (where / stage["run"] / "run.json").is_file()
        assert (where / stage["recipe"]).is_file()
    assert (where / "eval" / "test" / "summary.json").is_file()


def test_an_arm_or_a_seed_that_is_added_costs_itself_alone(grid: Path, fake: FakeRuns) -> None:
    assert main(["ablate", str(grid)]) == 0
    fake.trained.clear(), fake.scored.clear()
    fake.accuracy = lambda arm, seed: 0.5
    new = {"stages": ["A", {"stage": "B", "overrides": {"max_steps": 20}}]}
    edit(grid, lambda tree: tree["arms"].update(AC=new))
    assert main(["ablate", str(grid)]) == 0
    assert fake.labels() == ["B0", "B1"], "its first stage is there"
    assert fake.scored == ["AC 0", "AC 1"]
    fake.trained.clear(), fake.scored.clear()
    edit(grid, lambda tree: tree.update(seeds=[1, 0, 2]))
    assert main(["ablate", str(grid)]) == 0
    assert sorted(fake.labels()) == ["A2", "A2", "B2", "B2", "B2", "B2"]
    assert results(grid)["arms"]["AC"]["seeds"] == [1, 0, 2]


def test_parts_of_a_grid_are_run_by_name(grid: Path, fake: FakeRuns) -> None:
    assert main(["ablate", str(grid), "--arms=BB,AA", "--seeds=1"]) == 0
    assert sorted(fake.scored) == ["AA 1", "BB 1"]
    text = (grid.parent / "out" / "results.md").read_text()
    assert "Not finished yet: AA (seed 0); AB (seed 0, 1); BB (seed 0)." in text
    assert "Problems to fix" not in text
    found = results(grid)["arms"]
    assert found["AB"]["missing"] == {"0": "waits", "1": "waits"}
    assert found["BB"]["tests"]["test"]["gain"]["mean"] == pytest.approx(0.2)
    assert found["BB"]["tests"]["test"]["gain"]["low"] is None
    assert "none (one seed)" in (grid.parent / "out" / "results.md").read_text()


# What came out ----


def test_gains_are_paired_and_have_intervals(grid: Path, fake: FakeRuns) -> None:
    assert main(["ablate", str(grid)]) == 0
    found = results(grid)
    gain = found["arms"]["AB"]["tests"]["test"]["gain"]
    assert gain == pytest.approx(estimate([0.2, 0.15]))
    assert found["arms"]["AB"]["tests"]["test"]["gain_by_type"]["count"]["mean"] == pytest.approx(0.0875)
    assert found["arms"]["AA"]["tests"]["test"].get("gain") is None
    assert found["arms"]["AA"]["tests"]["test"]["accuracy"]["mean"] == pytest.approx(0.55)
    # AA, AB, BB are 0.55, 0.725, 0.725; published 50, 60, 55: ranks 1, 2.5, 2.5 against 1, 3, 2.
    assert found["rank"]["spearman"] == pytest.approx(0.8660254)
    assert found["rank"]["by_seed"]["0"] == pytest.approx(1.0)
    assert found["rank"]["by_seed"]["1"] == pytest.approx(0.5)


def test_the_order_of_arms_is_that_of_the_seeds_that_all_have(grid: Path, fake: FakeRuns) -> None:
    """Seed 0 has the published order; the second seed of BB alone would lift it above AB."""
    assert main(["ablate", str(grid), "--seeds=0"]) == 0
    assert main(["ablate", str(grid), "--arms=BB", "--seeds=1"]) == 0
    found = results(grid)
    means = [found["arms"][arm]["tests"]["test"]["accuracy"]["mean"] for arm in ARMS]
    assert means == pytest.approx([0.5, 0.7, 0.725])
    assert found["rank"]["spearman"] == pytest.approx(1.0)
    assert found["rank"]["by_seed"] == {"0": pytest.approx(1.0)}


def test_cost_counts_a_shared_stage_once_in_all_and_whole_in_each_arm(grid: Path, fake: FakeRuns) -> None:
    """Ten steps of 1 s, or of 2 s with a teacher."""
    assert main(["ablate", str(grid)]) == 0
    found = results(grid)
    assert [found["arms"][arm]["seconds"]["mean"] for arm in ARMS] == [20.0, 30.0, 40.0]
    assert found["cost"]["seconds"] == 2 * (10 + 10 + 20 + 20 + 20)
    assert found["cost"]["saved_by_sharing"] == 2 * 10


def test_the_last_diagnosis_of_each_stage_is_a_mean_over_seeds(grid: Path, fake: FakeRuns) -> None:
    assert main(["ablate", str(grid)]) == 0
    first, second = results(grid)["arms"]["AB"]["diagnostics"]
    assert first == {"tokens/student_nll": pytest.approx((0.1 + 1.1) / 2)}
    assert second == {"tokens/student_nll": pytest.approx((0.2 + 1.2) / 2)}


def test_gains_at_equal_time_are_read_from_the_curves(grid: Path, fake: FakeRuns) -> None:
    """The baseline takes 20 s. BB has had 10 steps of 2 s by then: its first stage."""
    edit(grid, lambda t: t.update(common={"evaluate": {"every": 5, "slices": {"val": {"data": "v.json"}}}}))
    fake.curve = lambda tree, step: step / 100 + (0.5 if _has_parent(tree) else 0.0)
    assert main(["ablate", str(grid)]) == 0
    arms = results(grid)["arms"]
    # At 20 s AA is at the end of its second stage, 0.6; BB at the end of its first, 0.1; AB, after 10 s of A
    # and 5 steps of B, at 0.55.
    assert arms["BB"]["equal_time"]["gain"]["mean"] == pytest.approx(0.1 - 0.6)
    assert arms["AB"]["equal_time"]["gain"]["mean"] == pytest.approx(0.55 - 0.6)
    assert arms["AB"]["equal_time"]["figure"] == "slice/val"
    assert arms["AB"]["equal_steps"]["figure"] == "test test", "as many steps: the finished students count"
    assert arms["AB"]["equal_steps"]["gain"]["mean"] == pytest.approx(0.175)
    html = (grid.parent / "out" / "results.html").read_text()
    assert "At equal time" in html
    assert html.count("polyline") == 2 * (2 + 2)


def test_gains_at_equal_operations_count_the_teachers_too(grid: Path, fake: FakeRuns) -> None:
    """A step of the baseline takes 2 x 2, of a taught arm 2 x (2 + 1): BB has 13 of 20, asked at 10."""
    edit(grid, lambda t: t.update(common={"evaluate": {"every": 5, "slices": {"val": {"data": "v.json"}}}}))
    fake.curve = lambda tree, step: step / 100 + (0.5 if _has_parent(tree) else 0.0)
    fake.operations = 2.0
    assert main(["ablate", str(grid)]) == 0
    found = results(grid)["arms"]
    assert found["BB"]["equal_operations"]["gain"]["mean"] == pytest.approx(0.1 - 0.6)
    assert found["AB"]["equal_operations"]["gain"]["mean"] == pytest.approx(0.55 - 0.6)
    assert "gain at equal operations" in (grid.parent / "out" / "results.md").read_text()


def test_logs_without_operations_are_not_compared_by_them(grid: Path, fake: FakeRuns) -> None:
    edit(grid, lambda t: t.update(common={"evaluate": {"every": 5, "slices": {"val": {"data": "v.json"}}}}))
    fake.curve = lambda tree, step: step / 100
    assert main(["ablate", str(grid)]) == 0
    found = results(grid)["arms"]["AB"]["equal_operations"]
    assert found == {"gain": None, "figure": None, "not_measured": "some logs do not have the operations"}


def test_unequal_steps_are_compared_on_the_curve(grid: Path, fake: FakeRuns) -> None:
    edit(grid, lambda t: t.update(common={"evaluate": {"every": 5, "slices": {"val": {"data": "v.json"}}}}))
    edit(grid, lambda t: t["arms"].update(AB=["A", {"stage": "B", "overrides": {"max_steps": 30}}]))
    fake.curve = lambda tree, step: step / 100 + (0.3 if tree.get("teacher") else 0.0)
    assert main(["ablate", str(grid)]) == 0
    found = results(grid)["arms"]["AB"]
    assert found["steps"] == 40
    assert found["equal_steps"]["figure"] == "slice/val"
    assert found["equal_steps"]["gain"]["mean"] == pytest.approx(0.4 - 0.1)


def test_without_slices_nothing_is_said_at_equal_time(grid: Path, fake: FakeRuns) -> None:
    assert main(["ablate", str(grid)]) == 0
    found = results(grid)["arms"]["AB"]["equal_time"]
    assert found["gain"] is None
    assert found["not_measured"] == "no slice is evaluated during training"
    text = (grid.parent / "out" / "results.md").read_text()
    assert "| AB | 72.5 \u00b1 2.5 | +17.5 | -14.3 to +49.3 | 2 | 20 | 30 s | " in text
    assert " | +17.5 (-14.3 to +49.3) | not measured | not measured | 60 |" in text
    assert "Spearman, 3 arms" in text


def test_the_page_needs_nothing_from_elsewhere(grid: Path, fake: FakeRuns) -> None:
    edit(grid, lambda t: t["arms"]["BB"].update(what="<b>taught & twice</b>"))
    assert main(["ablate", str(grid)]) == 0
    html = (grid.parent / "out" / "results.html").read_text()
    assert not re.search(r"(src|href)=|url\(|@import|<script", html)
    assert "&lt;b&gt;taught &amp; twice" in html
    assert "+17.5" in html


# What goes wrong ----


def test_a_stage_that_fails_takes_its_arms_along_and_no_others(grid: Path, fake: FakeRuns, capsys) -> None:
    fake.broken = lambda tree: tree["seed"] == 1 and tree.get("teacher") is not None and not _has_parent(tree)
    said = refusal(grid, capsys)
    assert "BB seed 1" in said
    assert "ended with status 2: the last words" in said
    assert sorted(fake.scored) == ["AA 0", "AA 1", "AB 0", "AB 1", "BB 0"]
    missing = results(grid)["arms"]["BB"]["missing"]["1"]
    assert missing.startswith("not run because an earlier stage failed: B, seed 1 ended with status 2")
    assert "BB, seed 1: not run" in (grid.parent / "out" / "results.md").read_text()
    fake.broken = lambda tree: False
    fake.trained.clear(), fake.scored.clear()
    assert main(["ablate", str(grid)]) == 0
    assert fake.labels() == ["B1", "B1"]
    assert fake.scored == ["BB 1"]
    assert results(grid)["arms"]["BB"]["missing"] == {}


def _has_parent(tree: dict) -> bool:
    return Path(tree["student"]["checkpoint"]).parent.parent.name == "stages"


def test_an_arm_that_was_changed_after_it_began_is_refused_by_name(
    grid: Path, fake: FakeRuns, capsys
) -> None:
    assert main(["ablate", str(grid)]) == 0
    edit(grid, lambda t: t["arms"]["AB"].update(stages=["A", {"stage": "B", "overrides": {"optim.lr": 0.5}}]))
    said = refusal(grid, capsys)
    assert "arm AB (stage 2, B: optim.lr: 0.001 -> 0.5)" in said
    assert "arm AA" not in said
    edit(grid, lambda t: t["arms"]["AB"].update(stages=["A"]))
    assert "arm AB (it had 2 stages (A, B) and has 1 stages (A))" in refusal(grid, capsys)
    edit(grid, lambda t: t["arms"].pop("AB"))
    assert main(["ablate", str(grid)]) == 0, "an arm may be left out"
    edit(grid.parent / "plain.yaml", lambda t: t.update(global_batch_size=8))
    assert "arm AA (stage 1, A: global_batch_size: 4 -> 8)" in refusal(grid, capsys)


def test_an_arm_that_is_back_may_not_have_changed(grid: Path, fake: FakeRuns, capsys) -> None:
    assert main(["ablate", str(grid)]) == 0
    edit(grid, lambda t: t["arms"].pop("AB"))
    assert main(["ablate", str(grid)]) == 0
    edit(grid, lambda t: t["arms"].update(AB=["B", "A"]))
    assert "arm AB (stage 1, B: " in refusal(grid, capsys)


def test_a_stage_that_never_began_may_be_mended(grid: Path, fake: FakeRuns, capsys) -> None:
    fake.broken = lambda tree: tree.get("teacher") is not None
    refusal(grid, capsys)
    edit(grid, lambda t: t["stages"]["B"].update(overrides={"data.path": "there.json"}))
    fake.broken = lambda tree: False
    assert main(["ablate", str(grid)]) == 0


def test_a_model_that_was_replaced_after_it_began_is_refused(grid: Path, fake: FakeRuns, capsys) -> None:
    """Its path says the same; arms that are added later would start from another student."""
    student = grid.parent / "student"
    student.mkdir()
    (student / "model.safetensors").write_bytes(b"weights")
    assert main(["ablate", str(grid), "--arms=AA"]) == 0
    assert main(["ablate", str(grid), "--arms=AB"]) == 0
    (student / "model.safetensors").write_bytes(b"WEIGHTS")
    assert f"model {student} (other files)" in refusal(grid, capsys)


def test_a_test_that_has_been_answered_may_not_change(grid: Path, fake: FakeRuns, capsys) -> None:
    assert main(["ablate", str(grid)]) == 0
    (grid.parent / "other.json").write_text("[]")
    edit(grid, lambda t: t.update(tests={"test": str(grid.parent / "other.json")}))
    assert "test test (data: " in refusal(grid, capsys)
    edit(
        grid,
        lambda t: t.update(
            tests={"test": str(grid.parent / "test.json"), "b": str(grid.parent / "other.json")}
        ),
    )
    assert main(["ablate", str(grid)]) == 0, "another one may be added"
    assert results(grid)["arms"]["AA"]["tests"]["b"]["accuracy"]["count"] == 2


def test_files_of_another_version_or_grid_are_refused(grid: Path, fake: FakeRuns, capsys) -> None:
    assert main(["ablate", str(grid)]) == 0
    out = grid.parent / "out"
    found = results(grid)
    (out / "results.json").write_text(json.dumps({**found, "version": 2}))
    assert "results.json was written by another version (format 2, this one reads 1)" in refusal(grid, capsys)
    (out / "results.json").write_text("{")
    assert "is not a results file" in refusal(grid, capsys)
    (out / "results.json").unlink()
    edit(grid, lambda t: t.update(name="another"))
    assert "contains the ablation grid, not another" in refusal(grid, capsys)
    edit(grid, lambda t: t.update(name="grid"))
    manifest = json.loads((out / "ablation.json").read_text())
    (out / "ablation.json").write_text(json.dumps({**manifest, "version": 0}))
    assert "ablation.json was written by another version" in refusal(grid, capsys)
    (out / "ablation.json").write_text(json.dumps(manifest))
    stage = next((out / "stages").iterdir())
    (stage / "run.json").write_text("not JSON")
    assert "run.json is damaged" in refusal(grid, capsys)


def test_data_that_changed_before_an_arm_was_added_are_named(grid: Path, fake: FakeRuns) -> None:
    assert main(["ablate", str(grid), "--arms=AA,AB"]) == 0
    assert results(grid)["warnings"] == []
    fake.data = "a file of the same name"
    assert main(["ablate", str(grid)]) == 0
    warnings = results(grid)["warnings"]
    assert len(warnings) == 2, "one a seed"
    assert "the data or tokenizer changed during this ablation: with seed 0" in warnings[0]
    assert "AB and BB read different ones" in warnings[0]
    assert warnings[0] in (grid.parent / "out" / "results.md").read_text()


def test_a_test_file_that_is_not_there_is_said_before_anything_is_trained(
    grid: Path, fake: FakeRuns, capsys
) -> None:
    (grid.parent / "test.json").unlink()
    assert "test test: the file" in refusal(grid, capsys)
    assert fake.trained == []


def test_a_command_that_prepares_is_a_command_of_this_program(grid: Path, fake: FakeRuns, capsys) -> None:
    edit(grid, lambda t: t.update(prepare=["data nothing"]))
    assert "`prepare` failed with status 2: llava-kd data nothing" in refusal(grid, capsys).splitlines()[-1]
    assert fake.trained == []


# What it will cost ----


def test_a_dry_run_knows_what_is_done_and_what_it_took(grid: Path, fake: FakeRuns, capsys) -> None:
    words = ["ablate", str(grid), "--dry_run", "--jobs=2"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "3 arms x 2 seeds: 10 stages (12 without sharing); 0 finished, 0 started, 10 new" in said
    assert "to train: 100 steps; time unknown" in said
    assert main(["ablate", str(grid), "--arms=AB", "--seeds=0"]) == 0
    capsys.readouterr()
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "2 finished, 0 started, 8 new" in said
    # A second A takes 10 s, two seeds of it and a first one; five of B 20 s each.
    assert "to train: 80 steps; about 2 min of training, 65 s on 2 at once" in said
    assert fake.labels() == ["A0", "B0"]


def test_every_line_says_what_is_left(grid: Path, fake: FakeRuns, capsys) -> None:
    """Nine stages of ten steps, all taken to be as fast as the first; at the end they are known better."""
    assert main(["ablate", str(grid), "--jobs=1"]) == 0
    said = capsys.readouterr().out
    assert "[1 of 16] A, seed 0: 0 s; 15 left, about 2 min and 6 to score" in said
    assert "[14 of 16] B, seed 1: 0 s; 2 left, about 20 s" in said
    assert "nothing left" in said


def test_a_stage_that_was_broken_off_counts_what_is_left(grid: Path, fake: FakeRuns, capsys) -> None:
    assert main(["ablate", str(grid), "--arms=AA", "--seeds=0"]) == 0
    last = max((grid.parent / "out" / "stages").iterdir(), key=lambda p: (p / "run.json").stat().st_mtime_ns)
    (last / "run.json").unlink()
    lines = (last / "metrics.jsonl").read_text().splitlines(keepends=True)
    (last / "metrics.jsonl").write_text("".join(lines[:4]))
    capsys.readouterr()
    assert main(["ablate", str(grid), "--arms=AA", "--seeds=0", "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "1 finished, 1 started, 0 new" in said
    assert "to train: 6 steps; about 6 s of training" in said
