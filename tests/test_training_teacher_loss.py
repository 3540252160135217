"""The teacher's own loss on the responses stands in the log, and a bad teacher is pointed out once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_training_trainer import Run, TinyLoader
from tiny_batches import inputs, record
from tiny_llava import make_tiny_llava

from llava_kd.batch import Batch, TeacherRows
from llava_kd.distill.objective import places_read
from llava_kd.distill.taught import Taught, TopKPrediction
from llava_kd.distill.teaching.cached import CachedTeacher
from llava_kd.distill.teaching.from_teacher import OWN, FromTeacher
from llava_kd.distill.teaching.live import Teacher
from llava_kd.distill.terms.visual_kl import VisualKL
from llava_kd.losses import head_loss, reference
from llava_kd.models.files.checkpoint import load_stock
from llava_kd.models.mllm import MLLM, Prediction

WARNING = "the teacher's own cross-entropy on the responses"


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "reference"])
def test_it_is_what_transformers_says_of_the_teacher(teacher_dir: Path, fast: bool) -> None:
    stock = load_stock(str(teacher_dir)).stock.eval()
    rows = [record(i, answer=3 + i) for i in range(3)]
    batch = Batch(student=inputs(*rows), record_ids=("a", "b", "c"))
    formula = head_loss.head_loss if fast else reference.head_loss
    teaching = FromTeacher(Teacher(MLLM(stock), shares_tower=False), head_loss=formula)
    own = teaching.figures(batch, teaching.outside(batch, None), batch.counts())["teacher_cross_entropy"]
    total = count = 0.0
    with torch.no_grad():
        for row in rows:
            output = stock(input_ids=row.ids[None], pixel_values=row.pixels_ICHW, labels=row.labels[None])
            number = int((row.labels != -100).sum())
            total, count = total + float(output.loss) * number, count + number
    assert float(own) == pytest.approx(total / count, rel=1e-5)


def test_it_is_known_of_stored_states_whatever_the_terms_read(teacher_dir: Path) -> None:
    """A cache holds the responses for it, as `places_read` says; the largest logits do not give it."""
    batch = Batch(student=inputs(record(1)), record_ids=("a",))
    live = FromTeacher(Teacher(MLLM(load_stock(str(teacher_dir)).stock), shares_tower=False))
    taught = live.outside(batch, None)
    prediction = taught.prediction
    assert isinstance(prediction, Prediction)
    places_M = batch.student.places.response_N
    rows = TeacherRows(places_M=places_M, hidden_ME=prediction.hidden_BTD.flatten(0, 1)[places_M])
    stored = replace(batch, teacher_rows=rows)
    assert "response" in places_read({"visual_kl": VisualKL()})
    cached = FromTeacher(CachedTeacher(prediction.head_VD, prediction.bias_V))
    own = live.figures(batch, taught, batch.counts())[OWN]
    of_cache = cached.figures(stored, cached.outside(stored, None), batch.counts())[OWN]
    torch.testing.assert_close(of_cache, own)
    flat_BTK = torch.zeros(*batch.student.input_ids_BT.shape, 2)
    top = TopKPrediction(logits_BTK=flat_BTK, columns_BTK=flat_BTK.int(), rest_BT=flat_BTK[..., 0])
    assert not live.figures(stored, Taught(prediction=top), batch.counts())


def test_the_same_model_on_both_sides_has_one_cross_entropy(tmp_path: Path, teacher_dir: Path) -> None:
    run = Run(tmp_path / "run", teacher_dir, teacher_dir)
    run.trainer(TinyLoader(), log_every=1).fit()
    first = run.lines()[0]
    assert first["teacher_cross_entropy"] == pytest.approx(first["cross_entropy"], rel=1e-5)
    assert all("teacher_cross_entropy" in line for line in run.lines())


@pytest.fixture
def wild_dir(tmp_path: Path) -> Path:
    """A model that is sure of itself and wrong."""
    directory = make_tiny_llava(tmp_path / "wild", hidden=48, vocab_size=280, seed=5)
    weights = load_file(directory / "model.safetensors")
    weights = {name: v * 20 if name.endswith("lm_head.weight") else v for name, v in weights.items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_a_teacher_worse_than_the_student_is_said_once(
    tmp_path: Path, teacher_dir: Path, wild_dir: Path
) -> None:
    run = Run(tmp_path / "run", teacher_dir, wild_dir)
    run.trainer(TinyLoader(), log_every=1).fit()
    assert all(line["teacher_cross_entropy"] > line["cross_entropy"] for line in run.lines())
    assert len([line for line in run.said if WARNING in line]) == 1


def test_a_good_teacher_is_not_accused(tmp_path: Path, teacher_dir: Path, wild_dir: Path) -> None:
    run = Run(tmp_path / "run", wild_dir, teacher_dir)
    run.trainer(TinyLoader(), log_every=1).fit()
    assert all(line["teacher_cross_entropy"] < line["cross_entropy"] for line in run.lines())
    assert not any(WARNING in line for line in run.said)


def test_without_a_teacher_nothing_is_said_of_one(stage) -> None:
    from test_training_slices import lines

    from llava_kd.cli import main

    config = stage("run", distilled=False, max_steps=1)
    assert main(["train", str(config)]) == 0
    assert "teacher_cross_entropy" not in lines(config.with_suffix(""))[-1]
