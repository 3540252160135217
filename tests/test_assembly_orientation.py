"""A run that turns photos upright is remembered: by its model, its cache of a teacher, and itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_data_orientation import photo
from tiny_runs import write_stage
from transformers import AutoProcessor

from llava_kd.assembly.checkpoints import export_to
from llava_kd.assembly.parts.data import served, side_in
from llava_kd.assembly.parts.stored_teacher import identity, refuse_other
from llava_kd.assembly.settings import load
from llava_kd.assembly.verify import verify_data
from llava_kd.cli import main
from llava_kd.config import DataConfig
from llava_kd.data.pixels.images import decode
from llava_kd.data.sources.llava_json import LlavaJson
from llava_kd.evaluation.generation.chat import Chat
from llava_kd.evaluation.generation.generate import Generator, prepare
from llava_kd.evaluation.generation.questions import Question
from llava_kd.models.files.checkpoint import load_processor, load_stock
from llava_kd.models.files.upright import reads_upright

Stage = Callable[..., Path]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, shapes_dir: Path, student_dir: Path) -> Path:
    """The model of a stage that was trained with `data.exif: apply`."""
    root = tmp_path_factory.mktemp("upright")
    config = write_stage(
        root / "run", data=shapes_dir, student=student_dir, teacher=None, distilled=False, max_steps=1
    )
    assert main(["train", str(config), "--data.exif=apply"]) == 0
    return root / "run" / "model"


def test_a_finished_model_remembers_and_its_card_says_it(finished: Path, tmp_path: Path) -> None:
    export_to(str(finished), str(tmp_path / "export"), dtype=None, scores=())
    for directory in (finished, tmp_path / "export"):
        assert reads_upright(load_processor(str(directory)))
        assert "PIL.ImageOps.exif_transpose" in (directory / "README.md").read_text()
        stock = AutoProcessor.from_pretrained(directory).image_processor
        assert stock.to_dict()["do_exif_transpose"] is True


def test_eval_chat_and_slices_of_it_turn_photos_and_those_of_others_do_not(
    finished: Path, student_dir: Path, tmp_path: Path
) -> None:
    (path := tmp_path / "photo.jpg").write_bytes(photo(6))
    question = Question(id="q", text="<image>\nWhat is it?", images=(path,))
    for directory, upright in ((finished, True), (student_dir, False)):
        processor = Generator.load(directory, device=torch.device("cpu")).processor
        image = Image.fromarray(decode(path.read_bytes(), upright=upright).numpy())
        expected = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
        assert torch.equal(prepare(processor, [question]).inputs["pixel_values"], expected)
        (seen,) = Chat.load(str(directory), [str(path)]).images
        assert seen.tobytes() == image.tobytes()
        assert seen.size == image.size


def test_a_slice_sees_what_the_run_trains_on_before_the_model_is_written(student_dir: Path) -> None:
    parts = load_stock(str(student_dir))
    for aspect in ("square", "pad"):
        turns = served(parts, DataConfig(path="", image_aspect=aspect, exif="apply"))
        assert reads_upright(turns.processor)
        plain = served(parts, DataConfig(path="", image_aspect=aspect))
        assert "do_exif_transpose" not in plain.processor.image_processor.to_dict()
    assert not reads_upright(parts.processor)


@pytest.mark.parametrize("words", [[], ["--dry_run"]])
def test_a_stage_that_would_forget_it_is_refused(
    finished: Path, stage: Stage, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    config = stage("next", distilled=False, max_steps=1)
    start = [f"--student.checkpoint={finished}", *words]
    assert main(["train", str(config), *start]) == 2
    assert "set data.exif to apply" in capsys.readouterr().err
    assert main(["train", str(config), *start, "--data.exif=apply"]) == 0


def test_a_teacher_that_was_trained_so_is_no_teacher_of_photos_as_they_are_stored(
    finished: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    config = stage("run", max_steps=1)
    assert main(["train", str(config), f"--teacher.checkpoint={finished}"]) == 2
    assert "set data.exif to apply" in capsys.readouterr().err


def test_verify_reads_as_the_model_does(finished: Path, shapes_dir: Path) -> None:
    data = DataConfig(path=str(shapes_dir / "instructions.json"), images=str(shapes_dir))
    assert verify_data(data, model=str(finished)).is_sound


def test_a_run_does_not_go_on_with_the_other_setting(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    config = stage("run", distilled=False, max_steps=1)
    assert main(["train", str(config)]) == 0
    assert main(["train", str(config), "--max_steps=2", "--data.exif=apply"]) == 2
    assert "data.exif: ignore -> apply" in capsys.readouterr().err


def test_a_cache_of_the_other_setting_is_refused_by_its_name(stage: Stage, shapes_dir: Path) -> None:
    plain = load(stage("run"))
    assert plain.teacher is not None
    turns = replace(plain, data=replace(plain.data, exif="apply"))
    source = LlavaJson(shapes_dir / "instructions.json", shapes_dir)
    parts = load_stock(str(plain.teacher.checkpoint))
    there, here = (identity(plain.teacher, side_in(c, parts, plain.teacher), source) for c in (plain, turns))
    with pytest.raises(ValueError, match=r"other inputs \(data\.exif: ignore there, apply here\)"):
        refuse_other(there, here, "cache")
    older = {name: value for name, value in there.items() if name != "data.exif"}
    refuse_other(older, there, "cache")  # written before there was the setting
    with pytest.raises(ValueError, match=r"data\.exif: ignore there, apply here"):
        refuse_other(older, here, "cache")
