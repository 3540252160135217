"""What `llava-kd check` says of tools that will not open the student, against the exports that refuse it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_towers import make_language_model, make_tower

from llava_kd.assembly.parts.models import student_parts
from llava_kd.assembly.settings import load
from llava_kd.assembly.train import train
from llava_kd.cli import main
from llava_kd.config import StudentConfig
from llava_kd.models.files.checkpoint import Parts, save_stock
from llava_kd.models.files.other_tools import unopened


def student(root: Path, tower: str, kind: str = "qwen2", **more: object) -> Parts:
    text = make_language_model(kind, root / "text", **{"head_dim": 32, **more})
    config = StudentConfig(vision_tower=make_tower(tower, root / "tower"), language_model=str(text))
    return student_parts(config, template="chatml", seed=0)


def test_nothing_is_said_of_a_student_that_all_take(tmp_path: Path) -> None:
    assert unopened(student(tmp_path, "siglip", "qwen3")) == []


@pytest.mark.parametrize(
    ("tower", "kind", "more", "said"),
    [
        ("convnext", "qwen3", {}, ["none but llava_kd: the student has the tower"]),
        ("timm-convnext", "qwen3", {}, ["none but llava_kd: the student has the tower timm:convnext_tiny"]),
        ("open-clip-resnet", "qwen3", {}, ["none but llava_kd: the student has the tower open_clip:"]),
        ("dinov2", "qwen3", {}, ["vLLM reads LLaVA with a SigLIP or CLIP tower", "llama.cpp: "]),
        ("siglip", "olmo3", {"head_dim": 32}, ["llama.cpp: the student has the language model 'olmo3'"]),
        ("siglip", "qwen3", {"head_dim": 40}, ["vLLM on a CPU has no attention for heads of 40"]),
    ],
)
def test_each_tool_that_will_not_open_it_has_a_line(
    tmp_path: Path, tower: str, kind: str, more: dict, said: list[str]
) -> None:
    found = unopened(student(tmp_path, tower, kind, **more))
    assert len(found) == len(said), found
    assert all(line.startswith(start) for line, start in zip(found, said, strict=True)), found


@pytest.fixture
def only_here(tmp_path: Path) -> str:
    """A student with a tower of timm's, which no other tool knows."""
    save_stock(student(tmp_path, "timm-convnext"), tmp_path / "model")
    return f"--student.checkpoint={tmp_path / 'model'}"


SAID = "none but llava_kd: the student has the tower timm:convnext_tiny, for which stock LLaVA has no class"


def test_check_prints_them(
    only_here: str, stage: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(stage("run", distilled=False)), only_here]) == 0
    assert f"not for          {SAID}" in capsys.readouterr().out


def test_a_run_says_so_before_its_first_step(
    only_here: str, stage: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    train(load(stage("run", distilled=False, max_steps=1), [only_here]))
    said = capsys.readouterr().err
    assert f"some tools cannot open the finished student: {SAID}" in said
    assert said.index(SAID) < said.index("attention of the student")
