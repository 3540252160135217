"""Changes of pictures from YAML: what is refused and how, which records are kept, what is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny_runs import write_stage

from llava_kd.assembly.parts.data import source_in
from llava_kd.assembly.parts.teaching.pictures import Shown, kept_records
from llava_kd.assembly.settings import load
from llava_kd.cli import main
from llava_kd.config import HardConfig
from llava_kd.distill.teaching.pictures.warps import Pixels

HARD = {"hard": {"upper": 1e-6, "lower": 0.0, "show_every": 2, "keep_prompts": None}}
MIXUP = {"mixup": {"share": 0.5}}


def stage(tmp_path: Path, shapes_dir: Path, student_dir: Path, teacher_dir: Path, **more: Any) -> Path:
    return write_stage(
        tmp_path / "run", data=shapes_dir, student=student_dir, teacher=teacher_dir, max_steps=4, **more
    )


def edited(path: Path, *changes: tuple[str, object]) -> Path:
    """With these dotted keys set."""
    tree = yaml.safe_load(path.read_text())
    for key, value in changes:
        *above, last = key.split(".")
        place = tree
        for name in above:
            place = place[name]
        place[last] = value
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize("pictures", [HARD, MIXUP], ids=["hard", "mixup"])
def test_a_stage_with_it_runs_to_its_end_and_exports_the_student_alone(
    tmp_path: Path, shapes_dir: Path, student_dir: Path, teacher_dir: Path, pictures: dict
) -> None:
    held_out = {"path": str(shapes_dir / "instructions.json"), "images": str(shapes_dir), "max_records": 4}
    evaluate = {"every": 2, "losses": {"talks": held_out}}
    path = stage(tmp_path, shapes_dir, student_dir, teacher_dir, pictures=pictures, evaluate=evaluate)
    assert main(["train", str(path)]) == 0
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"teacher_cross_entropy", "response_kl"} <= lines[-1].keys()
    assert 4 < lines[-1]["loss/talks"] < 7  # about the log of 260 words
    if pictures is HARD:
        assert [round(line["hard_learning"], 4) for line in lines] == [1, 0, 0, 0]
        assert all(line["hard_changed"] == pytest.approx(1) for line in lines)
        shown = sorted(p.name for p in (run / "pictures").iterdir())
        assert shown == ["step-00000002.png", "step-00000004.png"]
    else:
        assert any(0 < line["mixed_tokens"] < 1 for line in lines)
    assert not any("hard" in name or "mixup" in name for name in (p.name for p in (run / "model").iterdir()))


REFUSED = {
    "cached teacher": (
        HARD,
        [("teacher.cache", "somewhere")],
        "`pictures` need the teacher model itself, but teacher.cache is somewhere",
    ),
    "cached teacher, mixup": (
        MIXUP,
        [("teacher.cache", "somewhere")],
        "`pictures` need the teacher model itself, but teacher.cache is somewhere",
    ),
    "quantised teacher": (
        HARD,
        [("teacher.quantize", "8bit")],
        "needs a gradient through the teacher to the pixels, but weights quantized to 8bit give none",
    ),
    "teacher in parts": (
        HARD,
        [("teacher.placement", "cpu_offload")],
        "set teacher.placement to replicated instead of cpu_offload",
    ),
    "no teacher": (
        MIXUP,
        [("teacher", None), ("objective", {"cross_entropy": {"weight": 1.0}})],
        "`pictures.mixup` needs a teacher, but `teacher` is null",
    ),
    "no divergence": (
        HARD,
        [("objective.response_kl", None)],
        "uses the divergence of objective.response_kl, but the terms are",
    ),
    "sharded student": (
        HARD,
        [("engine.kind", "fsdp2")],
        "which `engine.kind` fsdp2 does not support; use auto, single or ddp",
    ),
    "share": ({"mixup": {"share": 1.5}}, [], "`pictures.mixup.share`"),
    "no share": ({"mixup": {"share": 0.0}}, [], "`pictures.mixup.share`"),
    "thresholds": (
        {"hard": {"lower": 0.5, "upper": 0.1}},
        [],
        r"`pictures.hard.lower` \(0.5\) must be below `pictures.hard.upper` \(0.1\)",
    ),
    "pattern": (
        {"hard": {"keep_prompts": "(left"}},
        [],
        "`pictures.hard.keep_prompts` must be a regular expression",
    ),
    "nothing to change": (
        {"hard": dict.fromkeys(("translate", "scale", "rotate", "crop", "colour", "blur"), 0.0)},
        [],
        "changes nothing, because",
    ),
    "both": ({**HARD, **MIXUP}, [], "needs exactly one of hard and mixup"),
    "neither": ({"hard": None}, [], "needs exactly one of hard and mixup"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_its_name(
    tmp_path: Path, shapes_dir: Path, student_dir: Path, teacher_dir: Path, case: str
) -> None:
    pictures, changes, message = REFUSED[case]
    path = stage(tmp_path, shapes_dir, student_dir, teacher_dir, pictures=pictures)
    with pytest.raises(ValueError, match=message):
        load(edited(path, *changes))


@pytest.mark.parametrize("other", [MIXUP, None, {"hard": {**HARD["hard"], "rotate": 3.0}}], ids=str)
def test_a_run_does_not_go_on_with_another_change(
    tmp_path: Path, shapes_dir: Path, student_dir: Path, teacher_dir: Path, other: object, capsys
) -> None:
    path = stage(tmp_path, shapes_dir, student_dir, teacher_dir, pictures=HARD)
    assert main(["train", str(path)]) == 0
    edited(path, ("pictures", other), ("max_steps", 6))
    assert main(["train", str(path)]) != 0
    assert "already contains another run: pictures" in capsys.readouterr().err


def test_records_are_kept_by_their_question_or_their_type(
    tmp_path: Path, student_dir: Path, teacher_dir: Path
) -> None:
    def entry(name: str, question: str, answer: str, **more: str) -> dict[str, object]:
        talk = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        return {"id": name, "conversations": talk, **more}

    entries = [
        entry("colour", "What colour is it?", "It is left blank."),
        entry("place", "What is LEFT of the cube?", "A ball."),
        entry("read", "Read the sign.", "Stop."),
        entry("typed", "How many?", "Two.", type="count"),
        entry("later", "Hello", "Hello."),
        entry("leftover", "What about the leftovers?", "None."),
    ]
    entries[4]["conversations"] += [  # type: ignore[operator]
        {"from": "human", "value": "Where is it?"}, {"from": "gpt", "value": "There."},
    ]  # fmt: skip
    (tmp_path / "instructions.json").write_text(json.dumps(entries))
    path = stage(tmp_path, tmp_path, student_dir, teacher_dir)
    source = source_in(load(path))
    assert kept_records(HardConfig(), source) == {"place", "read", "later"}
    assert kept_records(HardConfig(keep_types=["count"]), source) == {"place", "read", "later", "typed"}
    assert kept_records(HardConfig(keep_prompts=None, keep_types=["count"]), source) == {"typed"}
    assert kept_records(HardConfig(keep_prompts=None), source) == frozenset()


def test_the_grid_shows_originals_above_what_became_of_them(tmp_path: Path) -> None:
    said: list[str] = []
    before_ICHW = torch.rand(10, 3, 6, 6)
    shown = Shown(tmp_path / "pictures", Pixels(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)), said.append)
    shown(7, 2 * before_ICHW - 1, 2 * (1 - before_ICHW) - 1)
    grid = np.asarray(Image.open(tmp_path / "pictures" / "step-00000007.png")).astype(float) / 255
    assert grid.shape == (16, 64, 3)  # eight of them, each with a gap of two pixels
    third = before_ICHW[2].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(grid[:6, 16:22], third, atol=0.003)
    np.testing.assert_allclose(grid[8:14, 16:22], 1 - third, atol=0.003)
    assert [p.name for p in (tmp_path / "pictures").iterdir()] == ["step-00000007.png"]
    assert not said


def test_a_grid_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "pictures").write_text("a file in the way")
    shown = Shown(tmp_path / "pictures", Pixels(mean=(0.5,), std=(0.5,)), said.append)
    shown(7, torch.zeros(1, 3, 6, 6), torch.zeros(1, 3, 6, 6))
    assert len(said) == 1
    assert "could not be written" in said[0]
