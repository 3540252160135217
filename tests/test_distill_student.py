"""The module that engines wrap: losses out, gradients in the trained parts, nothing else inside."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_batches import inputs, record
from tiny_objectives import objective_of

from llava_kd.batch import Batch
from llava_kd.distill.student import Student
from llava_kd.distill.terms.cross_entropy import CrossEntropy
from llava_kd.models.files.checkpoint import load_stock
from llava_kd.models.mllm import MLLM

BATCH = Batch(student=inputs(record(1), record(2)), record_ids=("a", "b"))


def build(student_dir: Path, *trainable: str) -> Student:
    mllm = MLLM(load_stock(str(student_dir)).stock, trainable=trainable)
    return Student(mllm, objective_of(cross_entropy=CrossEntropy())).train()


@pytest.mark.parametrize(
    "trainable",
    [
        ("multi_modal_projector",),
        ("multi_modal_projector", "language_model"),
        ("vision_tower", "multi_modal_projector", "language_model"),
    ],
    ids=len,
)
def test_frozen_parts_get_no_gradient(student_dir: Path, trainable: tuple[str, ...]) -> None:
    student = build(student_dir, *trainable)
    loss, _ = student(BATCH, BATCH.counts())
    loss.backward()
    for name, modules in student.mllm.parts().items():
        grads = [p.grad for module in modules for p in module.parameters()]
        assert any(g is not None and bool(g.any()) for g in grads) == (name in trainable), name
        assert name in trainable or all(g is None for g in grads), name


def test_features_computed_outside_give_the_same_loss(student_dir: Path) -> None:
    student = build(student_dir, "multi_modal_projector")
    inside, _ = student(BATCH, BATCH.counts())
    outside, means = student(BATCH, BATCH.counts(), student.mllm.image_features(BATCH.student))
    assert torch.equal(inside, outside)
    torch.testing.assert_close(means["cross_entropy"], outside.detach())


def test_a_frozen_tower_is_no_weight_of_the_module_and_a_trained_one_is(student_dir: Path) -> None:
    def tower_weights(student: Student) -> int:
        return sum("vision_tower" in name for name in student.state_dict())

    assert tower_weights(build(student_dir, "language_model")) == 0
    assert tower_weights(build(student_dir, "vision_tower")) > 0


def test_a_tied_head_is_one_parameter(student_dir: Path) -> None:
    student = build(student_dir, "language_model")
    head, embedding = student.mllm.lm_head.weight, student.mllm.language_model.get_input_embeddings().weight
    assert head is embedding
    assert sum(parameter is head for parameter in student.parameters()) == 1
