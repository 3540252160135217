"""A step's forward and backward never wait for the device: no operation whose result the host must read.

Seen on the CPU, where such an operation does not wait but is called all the same.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tiny_batches import inputs, record
from tiny_objectives import objective_of
from torch.utils._python_dispatch import TorchDispatchMode

from llava_kd.batch import Batch, Inputs
from llava_kd.distill.formulas import REFERENCE
from llava_kd.distill.learned_weights import LearnedWeights, learnable
from llava_kd.distill.objective import Objective
from llava_kd.distill.student import Student
from llava_kd.distill.taught import Taught
from llava_kd.distill.teaching.live import Teacher
from llava_kd.distill.terms.cross_entropy import CrossEntropy
from llava_kd.distill.terms.relation import Relation
from llava_kd.distill.terms.response_kl import ResponseKL
from llava_kd.distill.terms.text_relation import TextRelation
from llava_kd.distill.terms.visual_kl import VisualKL
from llava_kd.losses.checks import check_targets
from llava_kd.losses.kernels.row_torch import torch_rows
from llava_kd.models.attention import packed as packed_attention
from llava_kd.models.attention.packed import BY_RECORD
from llava_kd.models.files.checkpoint import load_stock
from llava_kd.models.mllm import MLLM

aten = torch.ops.aten
WAITS = {
    aten.nonzero.default,
    aten._local_scalar_dense.default,
    aten.masked_select.default,
    aten.masked_scatter_backward.default,  # selects by the mask below what a dispatch mode sees
    aten.is_nonzero.default,
    aten.equal.default,
    aten.unique_consecutive.default,
    aten._unique2.default,
}
# Called on a CPU alone: on CUDA targets are not looked at, and a Triton kernel reads the rows.
CPU_ONLY = {check_targets.__name__, torch_rows.__name__}
FAST = {"losses": "fast", "num_common": 260}
OBJECTIVES = {
    "all": objective_of(
        cross_entropy=CrossEntropy(),
        response_kl=ResponseKL(),
        visual_kl=VisualKL(),
        relation=Relation(),
        **FAST,
    ),
    "two kinds of KL": objective_of(
        cross_entropy=CrossEntropy(),
        response_kl=ResponseKL(temperature=2.0),
        visual_kl=VisualKL(divergence="reverse"),
        relation=Relation(tap="hidden", centre=True, normalise=True),
        **FAST,
    ),
    "cross-entropy beside visual KL": objective_of(
        cross_entropy=CrossEntropy(), visual_kl=VisualKL(), **FAST
    ),
    "weights of zero": objective_of(
        cross_entropy=CrossEntropy(weight=0), response_kl=ResponseKL(weight=0), **FAST
    ),
    "cross-entropy": objective_of(cross_entropy=CrossEntropy(weight=0.5), **FAST),
    "other relations": objective_of(
        relation=Relation(normalise_rows=True),
        text_relation=TextRelation(centre=True, normalise_rows=True),
        visual_kl=VisualKL(share=0.3),
        **FAST,
    ),
    "visual tokens resampled": objective_of(
        cross_entropy=CrossEntropy(),
        visual_kl=VisualKL(),
        relation=Relation(),
        align=lambda x_IME: x_IME,
        **FAST,
    ),
}


INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


def _is_mask(index: torch.Tensor | None) -> bool:
    return index is not None and index.dtype == torch.bool


class Waits(TorchDispatchMode):
    """Notes the functions that call what the host must wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.callers: list[str] = []

    def __torch_dispatch__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if func in WAITS or (func in INDEXING and any(_is_mask(index) for index in args[1])):
            ours = [f for f in traceback.extract_stack() if "/torch/" not in f.filename][:-1]
            self.callers.append(ours[-1].name)
        return func(*args, **(kwargs or {}))


RECORDS = [record(1), record(2, images=2, is_valid=False), record(3, images=0), record(4, answer=2)]


def batch_of(*, is_packed: bool, is_known: bool) -> Batch:
    rows = inputs(RECORDS[:2], RECORDS[2:]) if is_packed else inputs(*RECORDS)
    return Batch(student=known(rows) if is_known else rows, record_ids=("a", "b", "c", "d"))


def known(rows: Inputs) -> Inputs:
    return replace(rows, known_places=rows.places)


@pytest.fixture(scope="module")
def models(student_dir, teacher_dir) -> tuple[MLLM, MLLM]:
    student = MLLM(load_stock(str(student_dir)).stock, trainable=("multi_modal_projector", "language_model"))
    teacher = MLLM(load_stock(str(teacher_dir)).stock)
    for model in (student, teacher):
        packed_attention.use(model.language_model, BY_RECORD)
    teacher.watch_answers(range(1, 2))
    return student, teacher


def callers_of_a_step(models: tuple[MLLM, MLLM], objective: Objective, batch: Batch) -> set[str]:
    student, teacher = models
    module = Student(student, objective)
    frozen = Teacher(teacher, shares_tower=False, keeps_head_gram=True)
    waits = Waits()
    with waits:
        prediction = frozen(batch) if objective.needs_teacher else None
        loss, _ = module(
            batch, batch.counts(), student.image_features(batch.student), Taught(prediction=prediction)
        )
        loss.backward()
    assert bool(torch.isfinite(loss))  # active rows that were not as stated make it NaN
    return set(waits.callers)


@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_a_step_waits_for_nothing(models: tuple[MLLM, MLLM], objective: Objective, is_packed: bool) -> None:
    found = callers_of_a_step(models, objective, batch_of(is_packed=is_packed, is_known=True))
    assert found <= CPU_ONLY


def two_sides(*, num_shared: int | None) -> Batch:
    """The teacher's answer to one record has other tokens in two places."""
    batch = batch_of(is_packed=False, is_known=True)
    teacher = known(inputs(*RECORDS, pad_to=80))
    labels_BT = teacher.labels_BT.clone()
    first = (labels_BT[0] >= 0).nonzero()[:2, 0]
    labels_BT[0, first] = (labels_BT[0, first] + 1) % 250
    teacher = replace(teacher, labels_BT=labels_BT)
    return replace(batch, teacher=teacher, num_shared_targets=num_shared)


def test_two_sides_wait_for_nothing(models: tuple[MLLM, MLLM]) -> None:
    batch = two_sides(num_shared=len(batch_of(is_packed=False, is_known=True).student.places.response_N) - 2)
    for name in ("all", "two kinds of KL", "cross-entropy beside visual KL", "weights of zero"):
        assert callers_of_a_step(models, OBJECTIVES[name], batch) <= CPU_ONLY, name


def test_only_trust_in_the_teacher_waits_for_what_it_says(models: tuple[MLLM, MLLM]) -> None:
    batch = batch_of(is_packed=True, is_known=True)
    for trust in ("first", "probability"):
        trusting = objective_of(cross_entropy=CrossEntropy(), response_kl=ResponseKL(trust=trust), **FAST)
        assert callers_of_a_step(models, trusting, batch) - CPU_ONLY == {"chunks"}
    learned = replace(OBJECTIVES["all"], learned=LearnedWeights(learnable(OBJECTIVES["all"].terms)))
    assert callers_of_a_step(models, learned, batch) <= CPU_ONLY


def test_sides_that_nobody_compared_are_looked_at(models: tuple[MLLM, MLLM]) -> None:
    found = callers_of_a_step(models, OBJECTIVES["all"], two_sides(num_shared=None))
    assert found - CPU_ONLY == {"chunks"}


def test_the_reference_gives_the_same_step(models: tuple[MLLM, MLLM]) -> None:
    batch = batch_of(is_packed=True, is_known=True)
    losses = []
    fast = OBJECTIVES["all"]
    for objective in (fast, replace(fast, common=replace(fast.common, formulas=REFERENCE))):
        student, teacher = models
        loss, means = Student(student, objective)(
            batch, batch.counts(), taught=Taught(prediction=Teacher(teacher, shares_tower=False)(batch))
        )
        losses.append({"loss": loss, **means})
    for name, value in losses[0].items():
        torch.testing.assert_close(value, losses[1][name], rtol=1e-4, atol=1e-5)


def test_a_batch_whose_places_are_not_known_waits(models: tuple[MLLM, MLLM]) -> None:
    """The detector sees what the loader spares."""
    found = callers_of_a_step(models, OBJECTIVES["all"], batch_of(is_packed=True, is_known=False))
    assert "_where" in found
