"""Terms and parts of other methods through `llava-kd train`, from settings to a model that loads."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from tiny_llava import make_tiny_llava
from tiny_towers import make_language_model
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from llava_kd.assembly.settings import load
from llava_kd.assembly.train import train as run
from llava_kd.cli import main
from llava_kd.models.files.checkpoint import load_stock


def train(config: Path, *overrides: str) -> list[dict]:
    assert main(["train", str(config), *overrides]) == 0
    text = (config.with_suffix("") / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def moved(before: Path, after: Path) -> set[str]:
    old, new = (LlavaForConditionalGeneration.from_pretrained(d).state_dict() for d in (before, after))
    return {name.split(".")[1] for name in old if not torch.equal(old[name], new[name])}


def test_all_terms_train_with_a_shared_frozen_tower(stage, student_dir: Path, tmp_path: Path) -> None:
    config = stage("all", max_steps=3)
    lines = train(
        config,
        "--objective.response_dbild={}",
        "--objective.visual_switch={source: projector}",
        "--objective.attention={weight: 0.5}",
    )
    for line in lines:
        assert all(line[name] > 0 for name in ("response_dbild", "visual_switch", "attention", "relation"))
    assert moved(student_dir, tmp_path / "all" / "model") >= {"multi_modal_projector", "language_model"}


def test_the_papers_switch_trains_the_tower(stage, student_dir: Path, tmp_path: Path) -> None:
    objective = {"cross_entropy": {}, "response_dbild": {}, "visual_switch": {}}
    config = stage("switch", trainable=("vision_tower", "multi_modal_projector", "language_model"))
    tree = yaml.safe_load(config.read_text()) | {"objective": objective}
    config.write_text(yaml.safe_dump(tree))
    lines = train(config)
    assert lines[0]["visual_switch"] < 1e-6 < lines[-1]["visual_switch"]  # the towers start equal
    assert "vision_tower" in moved(student_dir, tmp_path / "switch" / "model")


@pytest.mark.parametrize("template", ["vicuna", "chatml"])
@pytest.mark.parametrize("source", ["tower", "projector"])
def test_all_terms_train_on_packed_rows_of_another_grid_and_template(
    stage, tmp_path: Path, source: str, template: str
) -> None:
    other = make_tiny_llava(tmp_path / "other", image_size=40, layers=3)
    trainable = ("vision_tower", "multi_modal_projector", "language_model")
    config = stage("attention", trainable=trainable if source == "tower" else trainable[1:])
    lines = train(
        config,
        f"--teacher.checkpoint={other}",
        f"--teacher.template={template}",
        "--data.visual_alignment=resample",
        "--data.packing.max_tokens=1024",
        "--data.packing.packs_per_step=2",
        "--engine.activation_checkpointing=true",
        "--objective.attention={}",
        "--objective.response_dbild={}",
        f"--objective.visual_switch={{source: {source}}}",
    )
    names = ("attention", "visual_switch", "response_dbild", "response_kl", "visual_kl", "relation")
    assert all(line[name] > 0 for line in lines for name in names)
    assert not any(line["bad_records"] for line in lines)


TEACHERS: dict[str, dict] = {
    "larger pictures": {"image_size": 40},
    "a CLS token": {"tower": "clip"},
    "a wider tower": {"tower_hidden": 64},
    "another strategy": {"strategy": "default"},
    "other weights": {"seed": 5},
}


@pytest.mark.parametrize(
    ("teacher", "overrides", "message"),
    [
        (
            "larger pictures",
            ["--objective.attention={}"],
            r"student has 16 visual tokens an image \(4 x 4\), the teacher 25 .* set data.visual_alignment",
        ),
        (
            "larger pictures",
            ["--objective.visual_switch={source: projector}"],
            r"student's 16 visual .* place of the teacher's 25 .* set data.visual_alignment to resample",
        ),
        (
            "larger pictures",
            ["--objective.visual_switch={}", "--trainable=[vision_tower]"],
            r"student's 16 visual .* place of the teacher's 25 .* set data.visual_alignment to resample",
        ),
        (
            "a CLS token",
            ["--objective.attention={}"],
            r"student has 16 .* the teacher 17 visual tokens an image \(1 prefix and 4 x 4\)",
        ),
        (
            "a CLS token",
            ["--objective.visual_switch={source: projector}", "--data.visual_alignment=resample"],
            r"the teacher has 1 prefix tokens .* the student 0: .*drop visual_switch",
        ),
        (
            "a wider tower",
            ["--objective.visual_switch={}", "--trainable=[vision_tower]"],
            r"student's tower has width 32, but the teacher's projector needs 64: set .*source to projector",
        ),
        *((name, ["projector"], "set student.vision_tower, vision_feature_layer and") for name in TEACHERS),
    ],
)
def test_sides_that_cannot_meet_are_refused_by_name(
    stage, student_dir: Path, tmp_path: Path, teacher: str, overrides: list[str], message: str
) -> None:
    other = make_tiny_llava(tmp_path / "other", **TEACHERS[teacher])
    config = stage("refused")
    tree = yaml.safe_load(config.read_text())
    tree["objective"] = {"cross_entropy": {}}
    if overrides == ["projector"]:
        student = load_stock(str(student_dir))
        student.stock.model.vision_tower.save_pretrained(tmp_path / "tower")
        student.processor.image_processor.save_pretrained(tmp_path / "tower")
        language_model = make_language_model("qwen2", tmp_path / "llm")
        tower = {"vision_tower": str(tmp_path / "tower"), "language_model": str(language_model)}
        tree["student"], tree["objective"]["response_kl"] = {**tower, "projector": "teacher"}, {}
        overrides = []
    tree["teacher"]["checkpoint"] = str(other)
    config.write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match=message):
        run(load(config, overrides))


def test_a_student_starts_with_its_teachers_projector_and_goes_on_with_it(
    stage, teacher_dir: Path, tmp_path: Path
) -> None:
    teacher = load_stock(str(teacher_dir))
    teacher.stock.model.vision_tower.save_pretrained(tmp_path / "tower")
    teacher.processor.image_processor.save_pretrained(tmp_path / "tower")
    language_model = make_language_model("qwen2", tmp_path / "llm")
    config = stage("first", trainable=("multi_modal_projector",), template="plain")
    tree = yaml.safe_load(config.read_text())
    tree["student"] = {
        "vision_tower": str(tmp_path / "tower"),
        "language_model": str(language_model),
        "projector": "teacher",
    }
    config.write_text(yaml.safe_dump(tree))
    train(config)
    first = tmp_path / "first" / "model"
    train(stage("second"), f"--student.checkpoint={first}")
    one, two = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / n / "model") for n in ("first", "second")
    )
    theirs = teacher.stock.model.multi_modal_projector.state_dict()
    for model in (one, two):
        projector = model.model.multi_modal_projector
        for name in theirs:
            assert torch.equal(projector.get_parameter(name), theirs[name]), name
    maps = [model.model.multi_modal_projector.width_map.weight for model in (one, two)]
    assert not torch.equal(*maps)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--objective.visual_switch={}"], "source` is tower, but the tower is frozen"),
        (
            ["--objective.visual_switch={source: projector}", "--trainable=[language_model]"],
            "neither projector nor tower is trained",
        ),
        (
            ["--objective.visual_switch={source: projector}", "--teacher.placement=fsdp"],
            "must be whole on every rank",
        ),
        (["--objective.visual_switch={candidates: 2}"], "must be at least 4"),
        (["--objective.attention={first: 0.7, last: 0.3}"], "must be less than `last`"),
        (["--objective.attention={first: 1.3}"], "from 0 to 1"),
        (
            ["--objective.attention={}", "--teacher.cache=somewhere"],
            "attention` need the teacher model itself",
        ),
        (["--data.decode=nvjpeg", "--teacher.cache=somewhere"], "nvjpeg gives other pixels: set it to cpu"),
        (["--student.projector=teacher"], "keeps its projector"),
    ],
)
def test_settings_that_cannot_work_are_refused(stage, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(stage("bad"), overrides)


def test_a_teachers_projector_needs_a_teacher_and_may_be_its_only_use(stage, tmp_path: Path) -> None:
    config = stage("alone", distilled=False)
    tree = yaml.safe_load(config.read_text())
    tree["student"] = {"vision_tower": "a/b", "language_model": "c/d", "projector": "teacher"}
    config.write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match="projector` is teacher but `teacher` is null"):
        load(config)
    assert load(config, ["--teacher.checkpoint=e/f"]).teacher is not None


def test_the_settings_on_the_page_load(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    blocks = re.findall(r"^```yaml\n(.*?)^```", (root / "docs/method.md").read_text(), re.S | re.M)
    assert len(blocks) == 2
    for text in blocks:
        tree = yaml.safe_load((root / "scripts/stage3_dft.yaml").read_text()) | yaml.safe_load(text)
        (tmp_path / "stage.yaml").write_text(yaml.safe_dump(tree))
        assert load(tmp_path / "stage.yaml").objective.needs_teacher
