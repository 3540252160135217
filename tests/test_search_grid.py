"""Ablation files: what they may say, and which stages two arms share."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from tiny_grids import edit, write_grid

from llava_kd.assembly.runs.run_dir import MAY_CHANGE
from llava_kd.cli import main
from llava_kd.search.findings.elsewhere import read_elsewhere
from llava_kd.search.grids.grid import read_grid
from llava_kd.search.grids.sharing import NEUTRAL, make_plan

ROOT = Path(__file__).parents[1]
ARMS = {"AA": ["A", "A"], "AB": ["A", "B"], "BB": ["B", "B"]}


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    return write_grid(tmp_path, ARMS)


def chains(path: Path, *overrides: str) -> dict[tuple[str, int], tuple[str, ...]]:
    return {(run.arm, run.seed): run.chain for run in make_plan(read_grid(path, overrides)).runs}


def test_arms_share_a_stage_of_the_same_settings_parents_and_seed(grid: Path) -> None:
    found = chains(grid)
    assert found["AA", 0][0] == found["AB", 0][0]
    assert found["AA", 0][1] != found["AA", 0][0], "the same settings after another stage are another stage"
    assert found["AB", 0][1] != found["BB", 0][1], "its parent differs"
    assert not set(found["AA", 0]) & set(found["AA", 1]), "its seed differs"
    assert len(make_plan(read_grid(grid)).stages) == 2 * 5


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optim.lr", 0.5),
        ("data.path", "other.json"),
        ("data.template", "plain"),
        ("student.checkpoint", "other"),
        ("objective.cross_entropy.weight", 2.0),
        ("max_steps", 11),
        ("global_batch_size", 8),
        ("trainable", ["multi_modal_projector"]),
        ("engine.precision", "bf16"),
        ("checkpoint.best", "slice/val"),
        ("teacher", {"checkpoint": "t"}),
    ],
)
def test_whatever_decides_a_result_makes_another_stage_and_others_after_it(
    grid: Path, key: str, value: object
) -> None:
    before = chains(grid)
    edit(grid, lambda tree: tree["stages"]["A"].update(overrides={key: value}))
    after = chains(grid)
    assert not set(before["AA", 0]) & set(after["AA", 0])
    assert after["AB", 0][1] != before["AB", 0][1], "its parent is another"
    assert after["BB", 0] == before["BB", 0]


@pytest.mark.parametrize(
    "override",
    [
        "--log.every=7",
        "--output_dir=elsewhere",
        "--checkpoint.every=3",
        "--data.num_workers=2",
        "--evaluate=null",
    ],
)
def test_what_only_says_where_and_how_is_the_same_stage(grid: Path, override: str) -> None:
    assert chains(grid, override) == chains(grid)


def test_what_is_neutral_here_may_change_in_a_run_that_goes_on() -> None:
    """Or a shared stage would be refused by `train` when another arm comes to it."""
    assert [
        name for name in NEUTRAL if not any(f"{name}.".startswith(may.rstrip(".")) for may in MAY_CHANGE)
    ] == []


def test_overrides_of_the_file_the_stage_the_arm_and_the_command_come_in_this_order(grid: Path) -> None:
    def change(tree: dict) -> None:
        tree["common"] = {"optim.lr": 1.0, "max_steps": 1, "seed": 99}
        tree["stages"]["A"]["overrides"] = {"max_steps": 2, "optim": {"weight_decay": 0.5}}
        tree["arms"]["AA"] = [{"stage": "A", "overrides": {"max_steps": 3, "global_batch_size": 8}}, "A"]

    edit(grid, change)
    first, second = read_grid(grid, ["--global_batch_size=16"]).arms["AA"].stages
    assert first.tree["max_steps"] == 3
    assert second.tree["max_steps"] == 2
    assert first.tree["global_batch_size"] == second.tree["global_batch_size"] == 16
    assert first.tree["optim"] == {"weight_decay": 0.5}, "a whole section replaces the one before"
    runs = make_plan(read_grid(grid)).stages.values()
    assert {run.tree["seed"] for run in runs} == {0, 1}, "the seed is the grid's"


def test_a_later_stage_goes_on_from_the_one_before(grid: Path) -> None:
    recipe = grid.parent / "plain.yaml"
    edit(recipe, lambda tree: tree.update(student={"vision_tower": "t", "language_model": "l"}))
    plan = make_plan(read_grid(grid))
    first, second = (plan.stages[key] for key in plan.of("AA")[0].chain)
    assert first.tree["student"] == {"vision_tower": "t", "language_model": "l"}
    assert second.tree["student"] == {"checkpoint": str(first.directory / "model")}
    assert second.parent == first.key


def refusal(path: Path, capsys, *words: str) -> str:
    capsys.readouterr()
    assert main(["ablate", str(path), "--dry_run", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("llava-kd ablate: ")
    assert len(said.splitlines()) == 1
    return said


MISTAKES = {
    "unknown key 'arm'": lambda t: t.update(arm=1),
    "must contain `seeds`": lambda t: t.pop("seeds"),
    "must contain `tests`": lambda t: t.update(tests={}),
    "[0] is there twice": lambda t: t.update(seeds=[0, 1, 0]),
    "must be whole numbers from 0; got [True, -1, 1.5]": lambda t: t.update(seeds=[True, -1, 1.5]),
    "`baseline` is AAA, which is not an arm (did you mean AA?)": lambda t: t.update(baseline="AAA"),
    "is C, which is not in `stages`": lambda t: t["arms"].update(AA=["C"]),
    "there is no recipe": lambda t: t["stages"]["A"].update(recipe="plane.yaml"),
    "did you mean plain.yaml?": lambda t: t["stages"]["A"].update(recipe="plane.yaml"),
    "unknown key 'override'": lambda t: t["arms"].update(AA=[{"stage": "A", "override": {}}]),
    "either a `stage` of the file or a `recipe`": lambda t: t["arms"].update(AA=[{"overrides": {}}]),
    "must list its `stages`": lambda t: t["arms"].update(AA=[]),
    "`published` must be a number": lambda t: t["arms"].update(AA={"stages": ["A"], "published": "high"}),
    "must have a name of letters": lambda t: t["arms"].update({"a/b": ["A"]}),
    "must name `data`": lambda t: t["tests"].update(test={"images": "x"}),
    "`max_new_tokens` must be": lambda t: t["tests"].update(test={"data": "x", "max_new_tokens": 0}),
    "the arms AA and CC must differ": lambda t: t["arms"].update(CC=["A", "A"]),
    "stage A: ": lambda t: t["stages"]["A"].update(overrides={"optim.lrr": 1}),
    "lrr": lambda t: t["stages"]["A"].update(overrides={"optim.lrr": 1}),
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line(grid: Path, capsys, words: str) -> None:
    edit(grid, MISTAKES[words])
    assert words in refusal(grid, capsys)
    assert not (grid.parent / "out").exists()


def test_arms_that_say_the_same_in_other_words_differ_in_nothing(grid: Path, capsys) -> None:
    """Left out, or set to what it is anyway; or where a run writes."""
    same = {"stage": "A", "overrides": {"objective.relation": None, "epochs": 1, "log.every": 3}}
    edit(grid, lambda tree: tree["arms"].update(CC=[same, "A"]))
    assert "the arms AA and CC must differ" in refusal(grid, capsys)


def test_an_arm_of_a_name_that_is_taken_is_refused(grid: Path, capsys) -> None:
    grid.write_text(grid.read_text().replace("arms:\n", "arms:\n  AB: [A]\n", 1))
    assert "the key ['AB'] is given twice" in refusal(grid, capsys)


def test_what_is_no_file_or_no_arm_of_it_is_refused(grid: Path, tmp_path: Path, capsys) -> None:
    assert "no ablation file" in refusal(tmp_path / "none.yaml", capsys)
    assert "has no arm XX; name one of AA, AB, BB" in refusal(grid, capsys, "--arms=AA,XX")
    assert "has no seed 5; name one of 0, 1" in refusal(grid, capsys, "--seeds=5")
    assert "an override looks like" in refusal(grid, capsys, "--optim.lr")
    assert "--optim.lr={ is not YAML" in refusal(grid, capsys, "--optim.lr={")
    grid.write_text("- 1")
    assert "must hold `key: value` lines" in refusal(grid, capsys)


@pytest.mark.parametrize(
    ("name", "num_stages", "num_steps"), [("stages", 65, 2200), ("terms", 75, 2200), ("hard", 45, 4100)]
)
def test_a_shipped_grid_fits_itself(name: str, num_stages: int, num_steps: int, monkeypatch, capsys) -> None:
    """All arms take as many steps, and are priced."""
    monkeypatch.chdir(ROOT)
    path = ROOT / "ablations" / f"{name}.yaml"
    grid = read_grid(path)
    plan = make_plan(grid)
    assert len(plan.stages) == num_stages
    steps = {run.arm: sum(plan.stages[key].steps or 0 for key in run.chain) for run in plan.runs}
    assert set(steps.values()) == {num_steps}
    assert len(grid.seeds) >= 5
    assert grid.curve == "slice/val"
    assert main(["ablate", str(path), "--dry_run", f"--out={path.parent / 'none'}"]) == 0
    assert f"{num_stages} stages" in capsys.readouterr().out
    assert not (path.parent / "none").exists()


def test_the_file_of_the_docs_works(tmp_path: Path, monkeypatch, capsys) -> None:
    text = re.findall(r"^```yml\n(.*?)^```", (ROOT / "docs" / "ablations.md").read_text(), re.S | re.M)[0]
    path = tmp_path / "rates.yaml"
    path.write_text(text.replace("../scripts", str(ROOT / "scripts")))
    assert main(["ablate", str(path), "--dry_run", f"--out={tmp_path / 'out'}"]) == 0
    assert "3 arms x 3 seeds: 15 stages (24 without sharing)" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "seeds"), [("stages", [0, 1, 2, 3, 4]), ("hard", [0])])
def test_the_results_that_come_with_a_grid_are_of_its_stages(name, seeds, monkeypatch) -> None:
    """Else `--with` refuses them: an edit of the grid, its recipes or a model needs new results."""
    monkeypatch.chdir(ROOT)
    grid = read_grid(ROOT / "ablations" / f"{name}.yaml")
    scored = read_elsewhere(grid, make_plan(grid), [ROOT / "ablations" / "results" / f"{name}.json"])
    pairs = {(one.arm, one.seed) for one in scored}
    assert pairs >= {(arm, seed) for arm in ("PT-SFT-SFT", "DPT-SFT-DFT") for seed in seeds}


def test_the_published_column_is_the_papers() -> None:
    grid = read_grid(ROOT / "ablations" / "stages.yaml")
    published = [arm.published for arm in grid.arms.values() if arm.name != "PT-SFT-SFT"]
    assert published == [54.7, 55.6, 55.8, 55.9, 56.6, 57.9, 58.0]
    assert isinstance(yaml.safe_load((ROOT / "ablations" / "stages.yaml").read_text()), dict)
