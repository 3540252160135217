"""The teacher: frozen, in eval, and out of everybody's reach."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_batches import inputs, record
from tiny_objectives import objective_of

from llava_kd.batch import Batch
from llava_kd.distill.student import Student
from llava_kd.distill.taught import Taught
from llava_kd.distill.teaching.live import Teacher
from llava_kd.distill.terms.cross_entropy import CrossEntropy
from llava_kd.distill.terms.response_kl import ResponseKL
from llava_kd.models.files.checkpoint import load_stock
from llava_kd.models.mllm import MLLM


@pytest.fixture
def teacher(teacher_dir: Path) -> Teacher:
    """With dropout, so that a teacher in training mode would contradict itself."""
    stock = load_stock(str(teacher_dir)).stock.train()
    for layer in stock.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    return Teacher(MLLM(stock, trainable=("language_model",)), shares_tower=False)


@pytest.fixture
def student(student_dir: Path) -> Student:
    mllm = MLLM(load_stock(str(student_dir)).stock, trainable=("multi_modal_projector", "language_model"))
    return Student(mllm, objective_of(cross_entropy=CrossEntropy(), response_kl=ResponseKL(), num_common=260))


BATCH = Batch(student=inputs(record(1), record(2)), record_ids=("a", "b"))


def test_the_teacher_says_the_same_twice_even_after_the_student_trains(
    teacher: Teacher, student: Student
) -> None:
    first = teacher(BATCH)
    student.train()
    second = teacher(BATCH)
    assert torch.equal(first.hidden_BTD, second.hidden_BTD)
    assert not any(module.training for module in teacher.mllm.stock.modules())


def test_no_gradient_reaches_the_teacher(teacher: Teacher, student: Student) -> None:
    shared = Teacher(teacher.mllm, shares_tower=True)
    prediction = shared(BATCH, teacher.mllm.image_features(BATCH.student).requires_grad_())
    assert not prediction.hidden_BTD.requires_grad
    assert not prediction.projected_IND.requires_grad
    loss, _ = student(BATCH, BATCH.counts(), taught=Taught(prediction=prediction))
    loss.backward()
    for parameter in teacher.mllm.stock.parameters():
        assert parameter.grad is None
        assert not parameter.requires_grad


def test_the_teacher_is_not_in_the_students_tree(teacher: Teacher, student: Student) -> None:
    loss, _ = student(BATCH, BATCH.counts(), taught=Taught(prediction=teacher(BATCH)))
    loss.backward()
    theirs = {id(tensor) for tensor in teacher.mllm.stock.state_dict(keep_vars=True).values()}
    assert not theirs & {id(tensor) for tensor in student.state_dict(keep_vars=True).values()}
    assert not any(module is teacher.mllm for module in student.modules())
    assert not isinstance(teacher, torch.nn.Module)


def test_a_shared_tower_is_not_run_again(teacher_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mllm = MLLM(load_stock(str(teacher_dir)).stock)
    features_INE = mllm.image_features(BATCH.student)
    expected = Teacher(mllm, shares_tower=False)(BATCH)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the tower ran")

    monkeypatch.setattr(mllm, "image_features", refuse)
    got = Teacher(mllm, shares_tower=True)(BATCH, features_INE)
    assert torch.equal(got.hidden_BTD, expected.hidden_BTD)


def test_a_teacher_with_a_tower_of_its_own_ignores_the_students_features(teacher: Teacher) -> None:
    features_INE = teacher.mllm.image_features(BATCH.student)
    assert torch.equal(teacher(BATCH, 0 * features_INE).hidden_BTD, teacher(BATCH).hidden_BTD)


def test_the_teacher_reads_its_own_side(teacher: Teacher) -> None:
    own = Batch(student=inputs(record(3)), teacher=BATCH.student, record_ids=("a", "b"))
    assert torch.equal(teacher(own).hidden_BTD, teacher(BATCH).hidden_BTD)
