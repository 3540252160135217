"""A project begun of a user's pictures: what is found, how it is sized, what is refused; that it loads."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from own_pictures import BACKBONES, write_csv, write_pictures

from llava_kd.assembly.pipeline import read_pipeline
from llava_kd.assembly.planning.estimate import ModelSizes, memory
from llava_kd.assembly.planning.machine import Gpu, Machine
from llava_kd.assembly.projects.filling import fill
from llava_kd.assembly.projects.init import RECIPE, Models, begin
from llava_kd.assembly.projects.own_data import Given, find_data
from llava_kd.assembly.projects.sizing import MEMORY_SHARE, Sizing, max_length, micro_batch
from llava_kd.assembly.settings import load
from llava_kd.cli import main

TINY = Models(
    teacher=str(BACKBONES / "teacher"),
    vision_tower=str(BACKBONES / "vision_tower"),
    language_model=str(BACKBONES / "student_llm"),
)
SMALL = Machine(cores=2, memory=8 << 30)
STAGES = sorted(path.name for path in RECIPE.glob("stage*.yaml"))


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """40 pictures in `photos`, and `table.csv` beside them."""
    write_csv(tmp_path / "table.csv", write_pictures(tmp_path / "photos", 40))
    return tmp_path


def given(own: Path, **more: object) -> Given:
    found = Given(images=str(own / "photos"), data=str(own / "table.csv"))
    return dataclasses.replace(found, **more)  # pyright: ignore[reportArgumentType]


# Sizes ----


@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_more_records_never_make_a_smaller_batch_or_more_epochs_and_steps_are_enough(ranks: int) -> None:
    sizes = [Sizing.of(count, ranks) for count in (10, 50, 200, 1_000, 5_000, 20_000, 100_000, 665_000)]
    batches = [size.global_batch_size for size in sizes]
    assert batches == sorted(batches)
    assert [size.epochs for size in sizes] == sorted((size.epochs for size in sizes), reverse=True)
    assert all(batch % ranks == 0 for batch in batches)
    assert all(size.steps >= 300 for size in sizes if size.epochs < 10)
    if ranks == 1:
        assert (sizes[-1].global_batch_size, sizes[-1].epochs) == (128, 1)  # the paper's


def test_the_steps_are_those_of_the_run(own: Path) -> None:
    begin(str(own / "p"), find_data(given(own), own), TINY, machine=SMALL)
    from llava_kd.assembly.planning.dry_run import plan

    config = load(own / "p" / STAGES[0])
    expected = Sizing.of(len(json.loads((own / "p/data/train.json").read_text())), 1).steps
    assert f"steps            {expected} (" in plan(config, 1)


def test_the_micro_batch_is_the_largest_that_fits(own: Path) -> None:
    begin(str(own / "p"), find_data(given(own), own), TINY, machine=SMALL)
    config = dataclasses.replace(load(own / "p" / STAGES[0]), global_batch_size=64)
    student = ModelSizes.of_directory(TINY.teacher or "", config)

    def needs(rows: int) -> float:
        return sum(memory(dataclasses.replace(config, micro_batch_size=rows), 1, student, student).values())

    for rows in (1, 4, 16):
        just = Machine(cores=2, memory=int(needs(rows) / MEMORY_SHARE) + 1)
        assert micro_batch(config, student, student, just, 1) == (rows, needs(rows))
        less = Machine(cores=2, memory=int(needs(rows) / MEMORY_SHARE) - 1)
        assert micro_batch(config, student, student, less, 1)[0] == max(1, rows // 2)


def test_the_smallest_gpu_and_not_the_machine_decides(own: Path) -> None:
    gpus = (Gpu(name="large", memory=80 << 30), Gpu(name="small", memory=1 << 20))
    machine = Machine(cores=64, memory=1 << 40, gpus=gpus)
    lines = begin(str(own / "p"), find_data(given(own), own), TINY, machine=machine)
    assert any("this GPU has 0 GB; see `Less memory`" in line for line in lines)
    config = load(own / "p" / STAGES[0])
    assert (config.micro_batch_size, config.engine.precision) == (1, "bf16")
    assert config.global_batch_size % 2 == 0
    command = yaml.safe_load((own / "p/pipeline.yaml").read_text())["command"]
    assert "llava_kd.assembly.runs.torchrun --standalone --nproc-per-node 2 -m llava_kd.cli train" in command


def test_every_record_fits_its_length() -> None:
    assert max_length(10, 1) == 896
    assert max_length(10, 1, tokens_per_image=36) == 128
    assert max_length(100_000, 1) == 2048
    assert max_length(10, 4) >= 4 * 729 + 10  # several pictures are not cut


# What is written ----


def test_the_stages_load_follow_each_other_and_read_what_was_split(own: Path) -> None:
    begin(str(own / "p"), find_data(given(own), own), TINY, machine=SMALL)
    pipeline = read_pipeline(own / "p" / "pipeline.yaml")
    configs = [stage.config for stage in pipeline.stages]
    assert [stage.path.name for stage in pipeline.stages] == STAGES
    for before, after in pairwise(configs):
        assert after.student.checkpoint == f"{before.output_dir}/model"
    train, validation, test = (
        json.loads((own / f"p/data/{name}.json").read_text()) for name in ("train", "validation", "test")
    )
    assert (len(train), len(validation), len(test)) == (32, 4, 4)
    pictures = [{entry["image"] for entry in part} for part in (train, validation, test)]
    assert len(set().union(*pictures)) == sum(map(len, pictures)) == 40
    assert all(config.data.path == str(own / "p/data/train.json") for config in configs)
    last = configs[-1]
    assert last.evaluate is not None
    assert last.evaluate.losses["validation"].path == str(own / "p/data/validation.json")
    assert (last.checkpoint.best, last.checkpoint.export) == ("loss/validation", "best")
    assert all(config.data.template == "vicuna" for config in configs)  # what this teacher speaks


def test_pictures_of_several_rows_stay_together_and_their_order_does_not_matter(own: Path) -> None:
    rows = [[f"IMG_{n:04d}.png", f"Question {k}?", "yes"] for n in range(1, 41) for k in range(3)]
    first = find_data(given(own, data=str(write_csv(own / "a.csv", rows))), own).splits
    random.Random(0).shuffle(rows)
    second = find_data(given(own, data=str(write_csv(own / "b.csv", rows))), own).splits
    for name in first:
        pictures = {entry["image"] for entry in first[name]}
        assert pictures == {entry["image"] for entry in second[name]}
        others = {e["image"] for other in first if other != name for e in first[other]}
        assert not pictures & others


def test_comments_of_the_recipe_stay_and_paths_are_whole(own: Path) -> None:
    begin(str(own / "p"), find_data(given(own), own), TINY, machine=SMALL)
    for name in STAGES:
        text = (own / "p" / name).read_text()
        comments = re.findall(r"# .*", (RECIPE / name).read_text())
        assert comments
        assert all(comment in text for comment in comments)
        assert "data/images" not in text


def test_settings_go_into_the_stages_that_have_their_section(own: Path) -> None:
    words = ["--optim.lr=3e-3", "--teacher.placement=cpu_offload", "--objective.visual_kl=null", "--seed=7"]
    begin(str(own / "p"), find_data(given(own), own), TINY, words, machine=SMALL)
    first, second, third = (load(own / "p" / name) for name in STAGES)
    assert all((config.optim.lr, config.seed) == (3e-3, 7) for config in (first, second, third))
    assert second.teacher is None
    assert third.teacher is not None
    assert third.teacher.placement == "cpu_offload"
    assert "visual_kl" not in first.objective.terms
    assert "relation" in first.objective.terms


def test_steps_that_a_user_asks_for_are_those_that_are_told(own: Path) -> None:
    for words, steps in ((["--epochs=2", "--global_batch_size=16"], 4), (["--max_steps=60"], 60)):
        lines = begin(str(own / f"p{steps}"), find_data(given(own), own), Models(), words, machine=SMALL)
        assert any(f" {steps} steps per stage" in line for line in lines)
        assert any("optimiser steps are too few" in line for line in lines) == (steps < 50)


def test_a_whole_student_needs_no_stage_that_composes_one(own: Path) -> None:
    models = Models(teacher=TINY.teacher, student=TINY.teacher)
    begin(str(own / "p"), find_data(given(own), own), models, machine=SMALL)
    stages = read_pipeline(own / "p/pipeline.yaml").stages
    assert [stage.path.name for stage in stages] == STAGES[1:]
    assert stages[0].config.student.checkpoint == TINY.teacher


def test_without_models_here_nothing_is_read_and_it_is_said(own: Path) -> None:
    lines = begin(str(own / "p"), find_data(given(own), own), Models(), machine=SMALL)
    assert any("not on this machine, so memory was not estimated" in line for line in lines)
    config = load(own / "p" / STAGES[0])
    assert config.teacher is not None
    assert config.teacher.checkpoint == str(own / "p" / "teacher")
    assert "llava-kd convert DIR --out teacher" in (own / "p/README.md").read_text()


def test_few_steps_are_warned_of_and_enough_are_not(tmp_path: Path) -> None:
    for count, is_warned in ((20, True), (60, False)):
        folder = tmp_path / str(count)
        write_csv(folder.with_suffix(".csv"), write_pictures(folder, count))
        found = find_data(Given(images=str(folder), data=f"{folder}.csv"), tmp_path)
        lines = begin(str(tmp_path / f"p{count}"), found, Models(), machine=SMALL)
        assert any("optimiser steps are too few" in line for line in lines) == is_warned


def test_a_small_table_holds_nothing_out_and_then_nothing_chooses(tmp_path: Path) -> None:
    write_csv(tmp_path / "t.csv", write_pictures(tmp_path / "photos", 20))
    found = find_data(Given(images=str(tmp_path / "photos"), data=str(tmp_path / "t.csv")), tmp_path)
    begin(str(tmp_path / "p"), found, Models(), machine=SMALL)
    last = load(tmp_path / "p" / STAGES[-1])
    assert (last.evaluate, last.checkpoint.best, last.checkpoint.export) == (None, None, "last")
    assert " eval " not in (tmp_path / "p/README.md").read_text()


def test_the_folder_alone_is_enough_where_its_table_lies_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_pictures(tmp_path / "photos", 30)
    write_csv(tmp_path / "photos" / "metadata.csv", rows, ("file_name", "question", "text"))
    monkeypatch.chdir(tmp_path / "photos")
    assert main(["init", "../p"]) == 0
    assert "records: 24 train, 3 validation, 3 test" in capsys.readouterr().out
    assert load(tmp_path / "p" / STAGES[0]).data.images == str(tmp_path / "photos")


def test_a_name_that_begins_with_the_folder_is_found(own: Path) -> None:
    rows = [[f"photos/IMG_{n:04d}.png", "What?", "yes"] for n in range(1, 41)]
    found = find_data(given(own, data=str(write_csv(own / "a.csv", rows))), own)
    assert all(entry["image"].startswith("IMG_") for part in found.splits.values() for entry in part)


def test_llava_json_keeps_its_records_as_they_are(own: Path) -> None:
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a"}]
    talk += [{"from": "human", "value": "And then?"}, {"from": "gpt", "value": "b"}]
    entries = [
        {"id": n, "image": f"IMG_{n:04d}.png", "conversations": talk, "kind": "x"} for n in range(1, 41)
    ]
    (own / "own.json").write_text(json.dumps(entries))
    splits = find_data(given(own, data=str(own / "own.json")), own).splits
    assert sorted((e for part in splits.values() for e in part), key=lambda e: e["id"]) == entries


# What is refused ----


@pytest.fixture
def refused(own: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What `llava-kd init` says as it refuses; nothing is left behind."""

    def run(*words: str | Path) -> str:
        before = sorted(own.rglob("*"))
        assert main(["init", *map(str, words)]) == 2
        assert sorted(own.rglob("*")) == before
        return capsys.readouterr().err

    return run


def test_a_folder_without_pictures(own: Path, refused: Callable[..., str]) -> None:
    (own / "empty").mkdir()
    said = refused(own / "p", "--images", own / "empty", "--data", own / "table.csv")
    assert f"{own / 'empty'} and its subfolders contain no picture (.jpg," in said
    assert "no image folder" in refused(own / "p", "--images", own / "none", "--data", own / "table.csv")


def test_a_folder_that_is_taken(own: Path, refused: Callable[..., str]) -> None:
    said = refused(own / "photos", "--data", own / "table.csv")
    assert "is not empty (it contains IMG_0001.png, IMG_0002.png, IMG_0003.png); name a new folder" in said
    assert f"llava-kd init PROJECT --images {own / 'photos'}" in said
    assert "is a file; name a new folder" in refused(own / "table.csv")


def test_pictures_that_are_missing_are_named_with_the_nearest(own: Path, refused: Callable[..., str]) -> None:
    rows = [[f"IMG_{n:04d}.png", "What?", "yes"] for n in range(1, 38)]
    rows += [["IMG_0038.PNG", "What?", "yes"], ["gone.png", "What?", "no"], ["../table.csv", "What?", "no"]]
    table = write_csv(own / "a.csv", rows)
    said = refused(own / "p", "--images", own / "photos", "--data", table)
    assert "3 records of" in said
    assert "row39: no picture IMG_0038.PNG below" in said
    assert "(did you mean IMG_0038.png?)" in said
    assert "record 'row41'" in said  # a path that leaves the folder
    found = find_data(given(own, data=str(table), skip_bad=True), own)
    assert sum(map(len, found.splits.values())) == 37


def test_a_table_of_other_columns(own: Path, refused: Callable[..., str]) -> None:
    table = write_csv(own / "a.csv", [["x", "y", "z"]], ("foto", "frage", "antwort"))
    said = refused(own / "p", "--images", own / "photos", "--data", table)
    assert "no column for image and question and answer; its columns are foto, frage, antwort" in said


def test_no_table_or_two(own: Path, refused: Callable[..., str]) -> None:
    assert "contains no table; name the .csv" in refused(own / "p", "--images", own / "photos")
    for name in ("a.csv", "b.csv"):
        (own / "photos" / name).write_text("image,question,answer\n")
    assert "contains a.csv, b.csv: several candidates" in refused(own / "p", "--images", own / "photos")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--teacher", "/no/such/teacher"], "the LLaVA checkpoint /no/such/teacher does not exist"),
        (["--student", "a/b", "--vision_tower", "c/d"], "--student names a whole model; leave out"),
        (["--optim.rate=1"], "no setting `rate` in `optim`"),
        (
            ["--columns", "image=Foto"],
            "no column 'Foto' for the image; its columns are image, question, answer",
        ),
    ],
)
def test_models_settings_and_columns_that_are_not_there(
    own: Path, refused: Callable[..., str], words: list[str], said: str
) -> None:
    assert said in refused(own / "p", "--images", own / "photos", "--data", own / "table.csv", *words)


# The stage files as text ----


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize(
    "values",
    [
        {"data.path": "a # b: c.json", "epochs": 3},
        {"objective.relation.tap": "hidden", "data.packing.max_tokens": 4096},
        {"student": {"checkpoint": "x"}, "evaluate": None},
        {"optim.lr_by_part": {"language_model": 1e-5}, "plugins": ["a.py"]},
        {"output_dir": "yes", "log": {"every": 1}},
    ],
    ids=str,
)
def test_a_filled_stage_reads_as_one_whose_tree_was_set(name: str, values: dict[str, object]) -> None:
    from llava_kd.config.trees import set_dotted

    text = (RECIPE / name).read_text()
    tree = yaml.safe_load(text)
    for key, value in values.items():
        set_dotted(tree, key, value)
    assert yaml.safe_load(fill(text, values)) == tree


def test_the_small_recipe_loads_and_is_what_the_wheel_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    import tomllib

    root = RECIPE.parents[2]
    assert (root / "scripts/recipes").resolve() == RECIPE.parent
    packed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "llava_kd"
    ]
    held = {path for pattern in packed for path in (root / "llava_kd").glob(pattern)}
    assert set(RECIPE.iterdir()) <= held
    pipeline = read_pipeline(RECIPE / "pipeline.yaml")
    assert [stage.path.name for stage in pipeline.stages] == STAGES
