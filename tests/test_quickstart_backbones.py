"""The command that makes the backbones runs at reduced length; what is shipped is small and loads."""

from __future__ import annotations

import importlib
import json
import random
from pathlib import Path

import pytest
import ranks
import torch
from transformers import AutoTokenizer, Qwen2ForCausalLM, SiglipVisionModel
from transformers.models.auto.image_processing_auto import (
    AutoImageProcessor,  # see llava_kd.models.towers.loading
)

SCRIPTS = Path(__file__).parents[1] / "scripts" / "quickstart"
SHIPPED = SCRIPTS / "backbones"
SHIPPED_HARD = SCRIPTS.parent / "hard" / "backbones"
MOST_BYTES = {SHIPPED: 9_000_000, SHIPPED_HARD: 13_000_000}
REDUCED = ("--tower-steps=2", "--tower-pictures=20", "--teacher-steps=2", "--student-steps=2", "--threads=1")

# `python SCRIPT words`, in a process that has imported everything.
SCRIPT = """
import os, runpy, sys
del sys.argv[0]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def make(out: Path, logs: Path, *more: str) -> ranks.Ended:
    words = [SCRIPT, str(SCRIPTS / "make_backbones.py"), f"--out={out}", *REDUCED, *more]
    return ranks.Ranks(words, logs, function=ranks.execute).wait()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quickstart") / "backbones"
    done = make(out, out.with_name("logs"))
    assert done.codes == (0,), done.log
    return out


def layouts(made: Path) -> list[Path]:
    return [made, SHIPPED, SHIPPED_HARD]


def test_the_parts_load_and_fit_each_other(made: Path) -> None:
    for root in layouts(made):
        tower = SiglipVisionModel.from_pretrained(root / "vision_tower", dtype=torch.float32)
        processor = AutoImageProcessor.from_pretrained(root / "vision_tower")
        size = (processor.size["height"], processor.size["width"])
        assert size == (tower.config.image_size,) * 2
        for name in ("teacher", "student"):
            tokenizer = AutoTokenizer.from_pretrained(root / f"{name}_llm")
            model = Qwen2ForCausalLM.from_pretrained(root / f"{name}_llm", dtype=torch.float32)
            assert model.config.vocab_size >= len(tokenizer)
            assert model.config.eos_token_id == tokenizer.eos_token_id
            assert model.config.pad_token_id == tokenizer.pad_token_id
            ids = torch.tensor([tokenizer("Where is the red circle?")["input_ids"]])
            assert torch.isfinite(model(input_ids=ids).logits).all()


def test_teacher_and_student_have_one_tokenizer(made: Path) -> None:
    for root in layouts(made):
        teacher, student = (
            (root / f"{name}_llm" / "tokenizer.json").read_bytes() for name in ("teacher", "student")
        )
        assert teacher == student


@pytest.mark.parametrize(
    "text", ["What colour is the star?", "Zürich 1.5 €\n\t{}", "<|im_start|>user\nhi<|im_end|>"]
)
def test_the_tokenizer_can_spell_any_text(made: Path, text: str) -> None:
    for root in layouts(made):
        tokenizer = AutoTokenizer.from_pretrained(root / "student_llm")
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
        assert len(tokenizer("<image>")["input_ids"]) == 1


def test_words_of_the_shapes_data_are_single_tokens(made: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made / "student_llm")
    assert len(tokenizer("USER")["input_ids"]) == 1
    for word in ("red", "triangle", "cross", "centre", "large", "yes", "no", "ASSISTANT"):
        assert len(tokenizer(f" {word}")["input_ids"]) == 1


def test_a_directory_that_holds_files_is_refused(made: Path, tmp_path: Path) -> None:
    done = make(made, tmp_path)
    assert done.codes == (2,), done.log
    assert "must be new or empty" in done.log


def test_the_record_of_how_it_was_made_is_complete(made: Path) -> None:
    record = json.loads((made / "made.json").read_text())
    assert record["arguments"]["seed"] == 0
    assert set(record["tower_accuracy_on_held_out_pictures"]) == {
        "occupied",
        "colour",
        "shape",
        "size",
        "cell",
    }


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch):
    """The table of what is made for each setting of the shapes."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("backbone_settings").SETTINGS


@pytest.mark.parametrize("name", ["easy", "hard"])
def test_what_a_patch_names_fits_the_tower_and_the_scene(settings, name: str) -> None:
    setting, rng = settings[name], random.Random(0)
    assert sum(setting.labels.values()) <= setting.tower.width, "a direction of its own for each value"
    assert setting.tower.image_size % setting.tower.patch_size == 0
    assert setting.llms["student"].width < setting.llms["teacher"].width
    for _ in range(20):
        scene = setting.shapes.splits["train"].scene(rng)
        labels = setting.patch_labels(scene, setting.tower.patches_per_side)
        assert len(labels) == setting.tower.patches_per_side**2
        for patch in labels:
            assert len(patch) == len(setting.labels)
            assert all(
                at in (-100, *range(size)) for at, size in zip(patch, setting.labels.values(), strict=True)
            )
            assert (-100 in patch) == (patch[0] == 0)


def test_each_hard_shape_is_named_by_the_patch_of_its_centre_and_no_other(settings) -> None:
    setting, rng = settings["hard"], random.Random(1)
    names = list(setting.labels)
    for _ in range(30):
        scene = setting.shapes.splits["train"].scene(rng)
        labels = [dict(zip(names, patch, strict=True)) for patch in setting.patch_labels(scene, 8)]
        found = [
            (12 * p["column"] + 4 * p["part across"], 12 * p["row"] + 4 * p["part down"], p["letter"] > 0)
            for p in labels
            if p["occupied"]
        ]
        assert sorted(found) == sorted((t.x // 4 * 4, t.y // 4 * 4, bool(t.label)) for t in scene)


@pytest.mark.slow
def test_the_hard_backbones_are_made_by_the_same_command(tmp_path: Path) -> None:
    done = make(tmp_path / "out", tmp_path / "logs", "--setting=hard")
    assert done.codes == (0,), done.log
    test_the_parts_load_and_fit_each_other(tmp_path / "out")
    made = json.loads((tmp_path / "out" / "made.json").read_text())
    assert {"letter", "digit"} <= set(made["tower_accuracy_on_held_out_pictures"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "student_llm")
    for word in ("leftmost", "nearest", "labelled", "written", "K", "triangle"):
        assert len(tokenizer(f" {word}")["input_ids"]) == 1, word


@pytest.mark.parametrize("shipped", MOST_BYTES, ids=lambda path: path.parent.name)
def test_what_is_shipped_is_small_and_holds_no_code(shipped: Path) -> None:
    files = [path for path in shipped.rglob("*") if path.is_file()]
    assert 0 < sum(path.stat().st_size for path in files) < MOST_BYTES[shipped]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja", ".md"}


def test_the_hard_models_that_are_shipped_are_of_the_table(settings) -> None:
    """An edit of a size or of how long the tower learns needs new models."""
    setting = settings["hard"]
    made = json.loads((SHIPPED_HARD / "made.json").read_text())["arguments"]
    assert (made["tower_steps"], made["tower_pictures"]) == (setting.tower_steps, setting.tower_pictures)
    for name, size in setting.llms.items():
        config = json.loads((SHIPPED_HARD / f"{name}_llm" / "config.json").read_text())
        assert (config["hidden_size"], config["num_hidden_layers"]) == (size.width, size.layers)
        assert config["vocab_size"] == size.vocab_rows
    teacher = json.loads((SHIPPED_HARD / "teacher" / "config.json").read_text())
    assert teacher["text_config"]["hidden_size"] == setting.llms["teacher"].width
