"""Which template each side gets is said before a run, and a teacher is asked by the one that it has."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llava_kd.assembly.check import check
from llava_kd.assembly.settings import load
from llava_kd.assembly.train import train

ANSWERED = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
OWN = (
    "<|im_start|>system\nZoo rules are here.<|im_end|>\n{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}" + ANSWERED
)
ENDLESS = OWN.replace("}}<|im_end|>", "}}")
Stage = Callable[..., Path]


def with_template(source: Path, out: Path, text: str) -> Path:
    shutil.copytree(source, out)
    assert (out / "chat_template.jinja").is_file()
    (out / "chat_template.jinja").write_text(text)
    return out


def lines(text: str) -> dict[str, str]:
    """What is said of either side's template."""
    found = (line.partition(" of the ")[2] for line in text.splitlines() if line.startswith("template"))
    return {side: said for side, _, said in (line.partition(": ") for line in found)}


def test_check_and_train_name_the_template_of_each_side(
    stage: Stage, teacher_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = with_template(teacher_dir, tmp_path / "teacher", OWN)
    config = load(str(stage("run", template="auto", max_steps=1)), [f"--teacher.checkpoint={teacher}"])
    said = lines(check(config, ranks=1, num_records=2))
    assert said["student"].startswith("chatml, its directory's own: its prompt is '<|im_start|>user")
    assert said["teacher"].startswith("own, its directory's own: its prompt is '<|im_start|>system")
    assert "Zoo rules are here." in said["teacher"]
    assert train(config) is None
    captured = capsys.readouterr()
    assert lines(f"{captured.out}\n{captured.err}") == said


def test_a_prompt_that_a_teacher_never_saw_is_named(stage: Stage, teacher_dir: Path, tmp_path: Path) -> None:
    teacher = with_template(teacher_dir, tmp_path / "teacher", OWN)
    config = load(str(stage("run", template="vicuna")), [f"--teacher.checkpoint={teacher}"])
    said = lines(check(config, ranks=1, num_records=2))
    assert said["teacher"].startswith(
        "vicuna, as set, not its directory's own, whose prompt is '<|im_start|>sys"
    )


def test_a_teacher_whose_system_sentence_would_be_lost_is_refused(
    stage: Stage, teacher_dir: Path, tmp_path: Path
) -> None:
    teacher = with_template(teacher_dir, tmp_path / "teacher", ENDLESS)
    path = str(stage("run", template="auto"))
    with pytest.raises(ValueError, match=r"Zoo rules are here\."):
        check(load(path, [f"--teacher.checkpoint={teacher}"]), ranks=1, num_records=2)
    named = [f"--teacher.checkpoint={teacher}", "--teacher.template=chatml"]
    assert "own template" not in check(load(path, named), ranks=1, num_records=2)
