"""The objective: an oracle for every term, and no dependence on how a step is cut into micro-batches.

Shape legend: B rows, T tokens, N rows of a term, V vocabulary rows, M visual tokens of an image.
"""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from operator import add
from pathlib import Path

import pytest
import torch
from tiny_batches import TOKENS, TinyRecord, inputs, record
from tiny_objectives import among, changed, objective_of
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div

from llava_kd.batch import Batch
from llava_kd.distill.objective import Objective
from llava_kd.distill.student import Student
from llava_kd.distill.taught import Taught
from llava_kd.distill.teaching.live import Teacher
from llava_kd.distill.terms.cross_entropy import CrossEntropy
from llava_kd.distill.terms.relation import Relation
from llava_kd.distill.terms.response_kl import ResponseKL
from llava_kd.distill.terms.visual_kl import VisualKL
from llava_kd.losses.divergence import Temperature
from llava_kd.models.files.checkpoint import load_stock
from llava_kd.models.mllm import MLLM

COMMON = 260
TRAINABLE = ("multi_modal_projector", "language_model")
ALL = objective_of(
    cross_entropy=CrossEntropy(),
    response_kl=ResponseKL(),
    visual_kl=VisualKL(weight=0.7),
    relation=Relation(weight=0.5),
    num_common=COMMON,
)
MIXED = objective_of(
    cross_entropy=CrossEntropy(weight=0.3),
    response_kl=ResponseKL(temperature=2.0, divergence="jsd", mix=0.3),
    visual_kl=VisualKL(weight=2.0, temperature=0.5, divergence="reverse"),
    relation=Relation(tap="hidden", centre=True, normalise=True),
    num_common=COMMON,
)
RECORDS = [
    record(1),
    record(2, images=0, answer=9),
    record(3, images=2, answer=1),
    record(4, prompt=11, answer=2),
    record(5, images=1, is_valid=False),
    record(6, images=0, answer=0),
    record(7, images=3, answer=17),
    record(8, answer=3),
]
Result = tuple[dict[str, Tensor], dict[str, Tensor]]


@pytest.fixture(scope="module")
def student(student_dir: Path) -> MLLM:
    return MLLM(load_stock(str(student_dir)).stock, trainable=TRAINABLE)


@pytest.fixture(scope="module")
def teacher(teacher_dir: Path) -> Teacher:
    return Teacher(MLLM(load_stock(str(teacher_dir)).stock), shares_tower=False)


def batch_of(*records: TinyRecord, teacher: list[TinyRecord] | None = None) -> Batch:
    return Batch(
        student=inputs(*records),
        teacher=None if teacher is None else inputs(*teacher),
        record_ids=tuple(f"r{number}" for number in range(len(records))),
    )


def run(batches: list[Batch], objective: Objective, student: MLLM, teacher: Teacher) -> Result:
    """Logged means and the loss summed over one step's micro-batches, and the gradients that they leave."""
    module = Student(student, objective)
    module.zero_grad()
    counts = reduce(add, (batch.counts() for batch in batches))
    means: dict[str, Tensor] = {}
    for batch in batches:
        prediction = teacher(batch) if objective.needs_teacher else None
        loss, partial = module(batch, counts, taught=Taught(prediction=prediction))
        loss.backward()
        for name, value in {"loss": loss.detach(), **partial}.items():
            means[name] = means.get(name, torch.zeros(())) + value
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    return means, gradients


def assert_same(got: Result, expected: Result) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(
                a[name], b[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


def cut(sizes: list[int], *, packed: bool = False) -> list[Batch]:
    parts, start = [], 0
    for size in sizes:
        records = RECORDS[start : start + size]
        ids = tuple(str(start + i) for i in range(size))
        rows = [records] if packed else records
        parts.append(Batch(student=inputs(*rows), record_ids=ids))
        start += size
    return parts


# Splits ----


@pytest.mark.parametrize("objective", [ALL, MIXED], ids=["one kind of KL", "two kinds of KL"])
@pytest.mark.parametrize("sizes", [[1, 7], [4, 4], [2, 3, 3], [1] * 8], ids=str)
def test_a_step_does_not_depend_on_the_split(
    student: MLLM, teacher: Teacher, sizes: list[int], objective: Objective
) -> None:
    whole = run(cut([8]), objective, student, teacher)
    assert_same(run(cut(sizes), objective, student, teacher), whole)


@pytest.mark.parametrize("sizes", [[8], [3, 5]], ids=str)
def test_a_step_does_not_depend_on_packing(student: MLLM, teacher: Teacher, sizes: list[int]) -> None:
    whole = run(cut([8]), ALL, student, teacher)
    assert_same(run(cut(sizes, packed=True), ALL, student, teacher), whole)


# Values ----


def logits_BTV(model: MLLM, batch: Batch, *, is_teacher: bool = False) -> Tensor:
    side = batch.teacher_inputs if is_teacher else batch.student
    with torch.no_grad():
        prediction = model(side, model.image_features(side))
        return prediction.hidden_BTD @ prediction.head_VD.T


def oracle(
    student: MLLM, teacher: MLLM, records: list[TinyRecord], temperature: Temperature
) -> dict[str, float]:
    """Every term from whole logits, record by record and position by position."""
    ce, response, visual, relation = [], [], [], []
    for item in records:
        batch = Batch(student=inputs(item))
        s_TV, t_TV = logits_BTV(student, batch)[0], logits_BTV(teacher, batch)[0]

        def kl(place: int, s_TV: Tensor = s_TV, t_TV: Tensor = t_TV) -> Tensor:
            z_s, z_t = s_TV[place, :COMMON], t_TV[place, :COMMON]
            if isinstance(temperature, str):
                return kl_div((z_s / z_s.std()).log_softmax(0), (z_t / z_t.std()).softmax(0), reduction="sum")
            log_s, p_t = (z_s / temperature).log_softmax(0), (z_t / temperature).softmax(0)
            return temperature**2 * kl_div(log_s, p_t, reduction="sum")

        for place in range(len(item.ids)):
            if item.labels[place] >= 0:  # predicted by the token before it
                ce.append(cross_entropy(s_TV[place - 1], item.ids[place]))
                response.append(kl(place - 1))
            if item.visual[place] and item.is_valid:  # distilled at its own place
                visual.append(kl(place))
        if item.is_valid and len(item.pixels_ICHW) > 0:
            for s_MV, t_MV in zip(
                s_TV[item.visual].split(TOKENS), t_TV[item.visual].split(TOKENS), strict=True
            ):
                relation.append(
                    1 - cosine_similarity((s_MV @ s_MV.T).ravel(), (t_MV @ t_MV.T).ravel(), dim=0)
                )
    terms = {"cross_entropy": ce, "response_kl": response, "visual_kl": visual, "relation": relation}
    return {name: float(torch.stack(values).mean()) for name, values in terms.items()}


@pytest.mark.parametrize("temperature", [1.0, 3.0, "std"])
def test_every_term_is_what_its_definition_says(
    student: MLLM, teacher: Teacher, temperature: Temperature
) -> None:
    objective = changed(
        ALL,
        response_kl=ResponseKL(temperature=temperature),
        visual_kl=VisualKL(weight=0.7, temperature=temperature),
    )
    means, _ = run(cut([8]), objective, student, teacher)
    expected = oracle(student, teacher.mllm, RECORDS, temperature)
    assert {name: float(means[name]) for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    total = (
        expected["cross_entropy"]
        + expected["response_kl"]
        + 0.7 * expected["visual_kl"]
        + 0.5 * expected["relation"]
    )
    assert float(means["loss"]) == pytest.approx(total, rel=1e-4)


def test_distillation_terms_and_their_gradients_are_zero_for_identical_models(student_dir: Path) -> None:
    student = MLLM(load_stock(str(student_dir)).stock, trainable=TRAINABLE)
    teacher = Teacher(MLLM(load_stock(str(student_dir)).stock), shares_tower=False)
    means, gradients = run(cut([8]), changed(ALL, cross_entropy=None), student, teacher)
    for name, value in means.items():
        assert abs(float(value)) < 1e-5, name
    assert all(bool((gradient.abs() < 1e-4).all()) for gradient in gradients.values())


TERMS = ("cross_entropy", "response_kl", "visual_kl", "relation")


@pytest.mark.parametrize("objective", [ALL, MIXED], ids=["one kind of KL", "two kinds of KL"])
@pytest.mark.parametrize("off", TERMS)
def test_a_term_that_is_off_is_out_of_the_loss_and_of_the_log(
    student: MLLM, teacher: Teacher, objective: Objective, off: str
) -> None:
    without = run(cut([8]), changed(objective, **{off: None}), student, teacher)
    alone = run(cut([8]), among(objective, off), student, teacher)
    everything = run(cut([8]), objective, student, teacher)
    assert without[0].keys() == {"loss", *TERMS} - {off}
    assert alone[0].keys() == {"loss", off}
    for name in TERMS:
        one = (alone if name == off else without)[0][name]
        torch.testing.assert_close(one, everything[0][name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(without[0]["loss"] + alone[0]["loss"], everything[0]["loss"])
    for name, gradient in everything[1].items():
        parts = without[1][name] + alone[1].get(name, 0)
        torch.testing.assert_close(parts, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tap", ["logits", "hidden", "projector"])
def test_the_relation_term_looks_where_its_tap_says(student: MLLM, teacher: Teacher, tap: str) -> None:
    objective = objective_of(relation=Relation(weight=1.0, tap=tap))  # type: ignore[arg-type]
    _, gradients = run([batch_of(record(1))], objective, student, teacher)
    reached = {name.split(".")[0] for name, gradient in gradients.items() if bool(gradient.any())}
    assert reached == {"projector": {"multi_modal_projector"}}.get(tap, set(TRAINABLE))


# Rows that must not count ----


def test_a_bad_record_adds_nothing(student: MLLM, teacher: Teacher) -> None:
    """Its grey image and its text stay in the batch but in no term."""
    good, bad = [record(1), record(2, images=2)], record(3, images=2, is_valid=False)
    assert_same(
        run([batch_of(good[0], bad, good[1])], ALL, student, teacher),
        run([batch_of(*good)], ALL, student, teacher),
    )


@pytest.mark.parametrize(
    "records",
    [
        [record(1, is_valid=False)],
        [record(1, images=0)],
        [record(1, images=0, answer=0)],
        [record(1, is_valid=False), record(2, images=0, is_valid=False)],
    ],
    ids=["bad image", "text only", "text without answer", "both bad"],
)
@pytest.mark.parametrize("objective", [ALL, MIXED], ids=["one kind of KL", "two kinds of KL"])
def test_a_batch_without_rows_is_finite_and_reaches_every_weight(
    student: MLLM, teacher: Teacher, objective: Objective, records: list[TinyRecord]
) -> None:
    means, gradients = run([batch_of(*records)], objective, student, teacher)
    assert all(bool(torch.isfinite(value)) for value in means.values())
    assert gradients.keys() == {name for name, p in student.named_parameters() if p.requires_grad}
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values())
    if not any(item.is_valid and bool((item.labels >= 0).any()) for item in records):
        assert float(means["loss"]) == 0
        assert not any(bool(gradient.any()) for gradient in gradients.values())


# Two sides ----


def test_a_teacher_with_a_longer_prompt_is_read_at_its_own_rows(student: MLLM, teacher: Teacher) -> None:
    """Same answers, other prompts: each side is read where its own answer and image are."""
    ours, theirs = [record(1), record(2, images=0)], []
    for item in ours:
        words, count = torch.randint(200, (3,)), 3
        front = item.labels.new_full((count,), -100)
        theirs.append(
            replace(
                item,
                ids=torch.cat([item.ids[:1], words, item.ids[1:]]),
                labels=torch.cat([front, item.labels]),
                visual=torch.cat([torch.zeros(count).bool(), item.visual]),
            )
        )
    batch = batch_of(*ours, teacher=theirs)
    means, _ = run([batch], ALL, student, teacher)
    total, rows = torch.zeros(()), 0
    s_BTV, t_BTV = logits_BTV(student, batch), logits_BTV(teacher.mllm, batch, is_teacher=True)
    for b, item in enumerate(ours):
        for place in (item.labels >= 0).nonzero().squeeze(1).tolist():
            log_s = s_BTV[b, place - 1, :COMMON].log_softmax(0)
            total += kl_div(log_s, t_BTV[b, place + 2, :COMMON].softmax(0), reduction="sum")
            rows += 1
    torch.testing.assert_close(means["response_kl"], total / rows, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("theirs", "kind"),
    [(record(2, answer=6), "response"), (record(2, tokens=9), "visual")],
    ids=["answers", "visual tokens"],
)
def test_sides_that_do_not_line_up_are_named(
    student: MLLM, teacher: Teacher, theirs: TinyRecord, kind: str
) -> None:
    good = batch_of(record(1), record(2), teacher=[record(1), record(2)])
    prediction = teacher(good)
    bad = replace(good, teacher=inputs(record(1), theirs))
    own = student(bad.student, student.image_features(bad.student))
    with pytest.raises(
        ValueError, match=rf"{kind} rows must line up: the student has .*, the teacher .*r0, r1"
    ):
        ALL(own, Taught(prediction=prediction), bad, bad.counts())


def test_distillation_terms_without_a_teacher_are_refused(student: MLLM) -> None:
    batch = batch_of(record(1))
    with pytest.raises(ValueError, match="has distillation terms but got no teacher prediction"):
        Student(student, ALL)(batch, batch.counts())
