"""Terms that read what goes through modules: states of the stock models, refused where there are none.

Shape legend: B rows, T tokens, N selected rows, D width.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import extra_terms
import pytest
import torch
from extra_terms import LayerStates
from tiny_batches import inputs, record
from tiny_objectives import objective_of

from llava_kd.batch import Batch
from llava_kd.cli import main
from llava_kd.distill.taught import Taught
from llava_kd.distill.teaching.live import Teacher
from llava_kd.distill.terms.term import Reads
from llava_kd.models.files.checkpoint import load_stock
from llava_kd.models.mllm import MLLM

RECORDS = [record(1), record(2, images=2), record(3, images=0)]
PLUGIN = Path(extra_terms.__file__)
LAYER = "language_model.layers.0"


def model(directory: Path, *taps: str) -> MLLM:
    mllm = MLLM(load_stock(str(directory)).stock.eval())
    mllm.watch_taps(taps)
    return mllm


def stock_states_ND(mllm: MLLM, batch: Batch, layer: int) -> torch.Tensor:
    """Of the stock model's own forward over the same embeddings, record by record."""
    side = batch.student
    out = mllm.stock(
        input_ids=side.input_ids_BT,
        pixel_values=side.pixels_ICHW,
        attention_mask=(side.segment_ids_BT > 0).long(),
        output_hidden_states=True,
    )
    return out.hidden_states[layer + 1].flatten(0, 1)[side.places.response_N]


@torch.no_grad()
def test_a_term_is_the_distance_of_the_stock_models_states(student_dir: Path, teacher_dir: Path) -> None:
    batch = Batch(student=inputs(*RECORDS[:2]), record_ids=("a", "b"))
    student, teacher = model(student_dir, LAYER), Teacher(model(teacher_dir, LAYER), shares_tower=False)
    objective = objective_of(layer_states=LayerStates(weight=1.0))
    prediction = student(batch.student, student.image_features(batch.student))
    losses = objective(prediction, Taught(prediction=teacher(batch)), batch, objective.counts(batch))
    own_ND, theirs_ND = (stock_states_ND(m, batch, 0) for m in (student, teacher.mllm))
    expected = (own_ND.mean(1) - theirs_ND.mean(1)).square().mean()
    torch.testing.assert_close(losses.loss, expected, rtol=1e-4, atol=1e-7)
    assert float(losses.loss) > 0


def test_what_is_not_declared_is_not_shown(student_dir: Path, teacher_dir: Path) -> None:
    class Silent(LayerStates):
        @property
        def reads(self) -> Reads:
            return replace(super().reads, teacher_taps=())

    batch = Batch(student=inputs(*RECORDS[:1]), record_ids=("a",))
    student, teacher = model(student_dir, LAYER), Teacher(model(teacher_dir, LAYER), shares_tower=False)
    prediction = student(batch.student, student.image_features(batch.student))
    objective = objective_of(layer_states=Silent())
    with pytest.raises(
        ValueError, match=r"add teacher_taps=\('language_model.layers.0', ...\) to its `reads`"
    ):
        objective(prediction, Taught(prediction=teacher(batch)), batch, objective.counts(batch))


def test_taps_of_a_teacher_need_the_model() -> None:
    with pytest.raises(
        ValueError, match=r"taps of the teacher \(language_model.norm\) need the model itself"
    ):
        Reads(teacher="states", teacher_taps=("language_model.norm",))


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        ("language_model.layer.0", r"names no module of the model; near it are language_model.layers.0"),
        ("language_model.layers.0:middle", r"ends in :input or :output"),
        ("vision_tower", r"must lie in multi_modal_projector or language_model"),
        ("lm_head", r"must lie in multi_modal_projector or language_model"),
    ],
)
def test_a_wrong_tap_is_refused_before_anything_runs(student_dir: Path, tap: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(student_dir, tap)


def words(stage: Path, *more: str) -> list[str]:
    return ["train", str(stage), f"--plugins=[{PLUGIN}]", *more]


def test_it_trains_from_yaml_in_packed_rows_too(stage, tmp_path: Path) -> None:
    config = stage("taps")
    term = "--objective.layer_states={weight: 0.5}"
    assert main(words(config, term)) == 0
    lines = (config.with_suffix("") / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["layer_states"] > 0
    packed = ("--data.packing.max_tokens=512", f"--output_dir={tmp_path / 'packed'}")
    assert main(words(config, term, *packed)) == 0


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_path_that_a_model_lacks_stops_the_run_before_a_step(stage, capsys, side: str) -> None:
    status = main(words(stage("wrong"), f"--objective.layer_states.{side}_layer=language_model.layers.99"))
    said = capsys.readouterr().err
    assert status == 2
    assert f"layer_states reads the {side}: the tap 'language_model.layers.99' names no module" in said
    assert "language_model.layers." in said.split("near it are")[1]
