"""A student with the connector over a grid, from settings to answers: train, stop, go on, score, export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_towers import make_language_model

from llava_kd.api import Chat
from llava_kd.cli import main
from llava_kd.models.files.checkpoint import load_stock
from llava_kd.models.projectors.conv_attention import ConvAttentionLlava


@pytest.fixture
def recipe(stage: Callable[..., Path], teacher_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes the YAML of a new student's stage."""
    teacher = load_stock(str(teacher_dir))
    teacher.stock.model.vision_tower.save_pretrained(tmp_path / "tower")
    teacher.processor.image_processor.save_pretrained(tmp_path / "tower")
    text = make_language_model("qwen2", tmp_path / "llm")

    def write(name: str, **changes: object) -> Path:
        path = stage(name, trainable=("multi_modal_projector",), template="plain", **changes)
        tree = yaml.safe_load(path.read_text())
        tree["student"] = {
            "vision_tower": str(tmp_path / "tower"),
            "language_model": str(text),
            "projector": "conv_attention",
        }
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {k: t for k, t in load_file(directory / "model.safetensors").items() if "projector" in k}


def test_it_trains_stops_goes_on_and_answers(
    recipe: Callable[..., Path],
    stage: Callable[..., Path],
    shapes_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kept = {"every": 2, "keep": 1}
    assert main(["train", str(recipe("whole", max_steps=4, checkpoint=kept))]) == 0
    said = capsys.readouterr()
    assert "conv_attention, for which stock LLaVA has no class" in said.out + said.err
    assert main(["train", str(recipe("parts", max_steps=2, checkpoint=kept))]) == 0
    assert main(["train", str(recipe("again", max_steps=4, checkpoint=kept))]) == 0
    whole, again = weights(tmp_path / "whole" / "model"), weights(tmp_path / "again" / "model")
    assert all(torch.equal(whole[name], again[name]) for name in whole)  # the same seed, the same student
    second = stage("second", max_steps=2)
    model = tmp_path / "whole" / "model"
    assert main(["train", str(second), f"--student.checkpoint={model}"]) == 0
    after = tmp_path / "second" / "model"
    back = load_stock(str(after)).stock
    assert isinstance(back, ConvAttentionLlava)
    moved = weights(after)
    assert moved.keys() == whole.keys()
    assert {name.split(".")[2] for name in moved if not torch.equal(moved[name], whole[name])} >= {
        *("linear_1", "linear_2", "query", "key", "value", "norm", "place_gate", "channel_gate")
    }
    test, out = shapes_dir / "test.json", tmp_path / "eval"
    words = ["eval", "--model", str(after), "--data", str(test), "--out", str(out), "--noise", "0.1"]
    assert main([*words, "--max_new_tokens", "4"]) == 0
    assert (out / "noise_0.1" / "answers.jsonl").is_file()
    picture = shapes_dir / json.loads(test.read_text())[0]["image"]
    assert isinstance(Chat(after, picture, max_new_tokens=4).ask("What is it?"), str)
    for form in ("hf", "gguf"):
        capsys.readouterr()
        assert main(["export", str(after), "--out", str(tmp_path / form), "--format", form]) != 0
        assert "has the connector conv_attention" in capsys.readouterr().err
        assert not (tmp_path / form).exists()
    assert main(["convert", str(after), "--out", str(tmp_path / "converted")]) != 0
    assert not (tmp_path / "converted").exists()


def test_a_killed_run_ends_where_an_undisturbed_one_does(
    recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava_kd.training import trainer

    kept = {"every": 2, "keep": 1}
    assert main(["train", str(recipe("whole", max_steps=4, checkpoint=kept))]) == 0
    original = trainer.Trainer._save

    class DiedError(Exception):
        pass

    def save_then_die(self: trainer.Trainer, done: int, figures: dict) -> None:
        original(self, done, figures)
        if done == 2:
            raise DiedError

    monkeypatch.setattr(trainer.Trainer, "_save", save_then_die)
    with pytest.raises(DiedError):
        main(["train", str(recipe("parts", max_steps=4, checkpoint=kept))])
    monkeypatch.setattr(trainer.Trainer, "_save", original)
    assert main(["train", str(recipe("parts", max_steps=4, checkpoint=kept))]) == 0
    whole, parts = weights(tmp_path / "whole" / "model"), weights(tmp_path / "parts" / "model")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_check_names_what_would_make_it_loadable(
    recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(recipe("looked_at"))]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("not for"))
    assert "none but llava_kd: the student has the connector conv_attention" in line
    assert "import llava_kd.models.projectors.conv_attention" in line
