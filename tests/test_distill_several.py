"""Several teachers through the objective and the loop: weights, splits, packing, resume, and what is refused.

Shape legend: V rows of a head, M teachers, P places of the flattened rows.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_distill_token_policy import batch_of, both, logits, says
from test_training_trainer import OBJECTIVE, Run, TinyLoader, assert_ends_like
from tiny_objectives import changed, objective_of
from torch import Tensor

from llava_kd.batch import IGNORE_INDEX, Batch, Counts
from llava_kd.distill.diagnosis import Diagnosis
from llava_kd.distill.formulas import FORMULAS
from llava_kd.distill.objective import Objective
from llava_kd.distill.taught import MixedPrediction, Taught
from llava_kd.distill.teaching.from_teacher import FromTeacher, mixture_figures, teacher_cross_entropy
from llava_kd.distill.teaching.guarded import Guarded
from llava_kd.distill.teaching.live import Teacher
from llava_kd.distill.teaching.several import SeveralTeachers, agreement
from llava_kd.distill.terms.relation import Relation
from llava_kd.distill.terms.response_dbild import ResponseDBiLD
from llava_kd.distill.terms.response_kl import ResponseKL
from llava_kd.distill.terms.visual_kl import VisualKL
from llava_kd.distill.token_policy import TokenPolicy
from llava_kd.models.mllm import MLLM, Prediction

SEEDS = (2, 5)
GIVEN = torch.tensor([0.7, 0.3]).log()


def mixed(batch: Batch, log_weights_M: Tensor | None = GIVEN, seeds=SEEDS) -> MixedPrediction:
    """Teachers with 270 rows; None: weighed by agreement."""
    parts = tuple(says(batch, seed, 270) for seed in seeds)
    if log_weights_M is None:
        return MixedPrediction(parts=parts, log_weights_PM=agreement(parts, batch, beta=0.5))
    places = batch.student.input_ids_BT.numel()
    return MixedPrediction(parts=parts, log_weights_PM=log_weights_M.expand(places, -1))


def step_of(batches: list[Batch], objective: Objective, teach, policy=None) -> tuple:
    """Loss, means, and the gradient of the student's head, over the micro-batches of a step."""
    counts: Counts = sum((b.counts() for b in batches[1:]), batches[0].counts())
    total, means, gradient_VD = 0.0, {}, torch.zeros(260, 8)
    for batch in batches:
        student = says(batch, 1)
        head_VD = student.head_VD.requires_grad_()
        rows = None if policy is None else policy.of(batch)
        prediction = teach(batch)
        found = objective(student, Taught(prediction=prediction, policy=rows), batch, counts)
        total += float(found.loss.detach())
        is_mixed = isinstance(prediction, MixedPrediction)
        figures = mixture_figures(prediction, batch, counts) if is_mixed else {}
        for name, value in {**found.means, **figures}.items():
            means[name] = means.get(name, 0.0) + float(value)
        gradient_VD += torch.autograd.grad(found.loss, head_VD)[0]
    return total, means, gradient_VD


def rows_of(batch: Batch) -> list[list[int]]:
    return (batch.student.targets_BT != IGNORE_INDEX).nonzero().tolist()


def weights_by_hand(batch: Batch, row: int) -> list[float]:
    """Of the only record of a row: exp(beta * mean log p(label)), over their sum."""
    places = [(b, t) for b, t in rows_of(batch) if b == row]
    means = []
    for seed in SEEDS:
        said = says(batch, seed, 270)
        found = [
            logits(said, b, t).log_softmax(0)[batch.student.labels_BT[b, t + 1]].item() for b, t in places
        ]
        means.append(sum(found) / len(found))
    factors = (0.5 * torch.tensor(means, dtype=torch.float64)).exp()
    return (factors / factors.sum()).tolist()


@pytest.mark.parametrize("losses", FORMULAS)
@pytest.mark.parametrize("by_agreement", [False, True])
def test_the_loss_is_that_of_the_mixed_probabilities_row_by_row(losses: str, by_agreement: bool) -> None:
    batch = batch_of((0,), (2,), (3,))
    found, means, _ = step_of([batch], both(losses), lambda b: mixed(b, None if by_agreement else GIVEN))
    student, total = says(batch, 1), 0.0
    for b, t in rows_of(batch):
        weights = weights_by_hand(batch, b) if by_agreement else GIVEN.exp().tolist()
        shares = [
            w * (logits(says(batch, seed, 270), b, t).double()[:258] / 2).softmax(0)
            for w, seed in zip(weights, SEEDS, strict=True)
        ]
        q = torch.stack(shares).sum(0)
        z = logits(student, b, t).double()
        total += 4.0 * float((q * (q.log() - (z[:258] / 2).log_softmax(0))).sum())
        total -= float(z.log_softmax(0)[batch.student.labels_BT[b, t + 1]])
    assert found == pytest.approx(total / len(rows_of(batch)), rel=1e-5)
    assert means["teacher_weight/1"] + means["teacher_weight/2"] == pytest.approx(1)


@pytest.mark.parametrize("losses", FORMULAS)
def test_copies_are_that_teacher_alone(losses: str) -> None:
    batch = batch_of((0,), (1, 2))
    alone = step_of([batch], both(losses), lambda b: says(b, 2, 270))
    for weights in (GIVEN, None):
        copies = step_of([batch], both(losses), lambda b, w=weights: mixed(b, w, seeds=(2, 2)))
        assert copies[0] == pytest.approx(alone[0], rel=1e-6)
        torch.testing.assert_close(copies[2], alone[2], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("losses", FORMULAS)
@pytest.mark.parametrize(
    "cut", [[[(0,)], [(1,)], [(2,)], [(3,)]], [[(3,), (1,)], [(0,), (2,)]], [[(2, 0), (3, 1)]]]
)
def test_neither_splits_nor_packing_nor_the_order_change_a_step(losses: str, cut: list) -> None:
    def teach(batch: Batch) -> MixedPrediction:
        return mixed(batch, None)

    whole = step_of([batch_of((0,), (1,), (2,), (3,))], both(losses), teach)
    other = step_of([batch_of(*rows) for rows in cut], both(losses), teach)
    assert 0.02 < whole[1]["teacher_weight/1"] < 0.98
    assert other[0] == pytest.approx(whole[0], rel=1e-6)
    assert other[1] == pytest.approx(whole[1], rel=1e-5)
    torch.testing.assert_close(other[2], whole[2], rtol=1e-5, atol=1e-7)


def test_every_record_has_weights_of_its_own() -> None:
    batch = batch_of((0, 3), (2,))
    log_weights_PM = mixed(batch, None).log_weights_PM
    assert len(log_weights_PM[batch.student.places.response_N, 0].unique()) == 3
    torch.testing.assert_close(log_weights_PM.exp().sum(1), torch.ones(len(log_weights_PM)))


def test_both_forms_agree_also_under_a_policy_for_private_tokens() -> None:
    batch = batch_of((0, 1), (2,), (3,))
    for policy in (None, TokenPolicy(temperature=40.0, noise=0.3)):
        plain, fused = (step_of([batch], both(form), mixed, policy) for form in ("reference", "fast"))
        assert fused[0] == pytest.approx(plain[0], rel=1e-6)
        torch.testing.assert_close(fused[2], plain[2], rtol=1e-5, atol=1e-7)
    without = step_of([batch], both("fast"), mixed)
    assert without[1]["response_kl"] != pytest.approx(fused[1]["response_kl"], rel=1e-2)


def test_a_policy_softens_the_mixture_not_the_first_teacher() -> None:
    batch, policy = batch_of((0,), (2,)), TokenPolicy(temperature=40.0, cross_entropy=1.0)
    found = step_of([batch], both("fast"), mixed, policy)[1]["response_kl"]
    scores_BT, total = batch.student.scores_BT, 0.0
    assert scores_BT is not None
    for b, t in rows_of(batch):
        shares = [
            w * (logits(says(batch, seed, 270), b, t).double()[:258] / 2).softmax(0)
            for w, seed in zip(GIVEN.exp().tolist(), SEEDS, strict=True)
        ]
        q = torch.stack(shares).sum(0)
        heat = 1 + 19 * float(scores_BT[b, t + 1])
        log_q = (q.log() / heat).log_softmax(0)
        log_p = (logits(says(batch, 1), b, t).double()[:258] / 2).log_softmax(0)
        total += 4.0 * float((log_q.exp() * (log_q - log_p)).sum())
    assert found == pytest.approx(total / len(rows_of(batch)), rel=1e-4)


def test_figures_and_diagnosis_are_of_the_mixture() -> None:
    batch = batch_of((0,), (1,))
    counts, student = batch.counts(), says(batch, 1)
    nll = [
        -torch.stack(
            [w * logits(says(batch, s, 270), b, t).softmax(0)[batch.student.labels_BT[b, t + 1]]
             for w, s in zip(GIVEN.exp(), SEEDS, strict=True)]
        ).sum().log()
        for b, t in rows_of(batch)
    ]  # fmt: skip
    expected = float(torch.stack(nll).mean())
    found = mixture_figures(mixed(batch), batch, counts)
    assert float(found["teacher_cross_entropy"]) == pytest.approx(expected, rel=1e-5)
    assert float(found["teacher_weight/1"]) == pytest.approx(0.7)
    diagnosis = Diagnosis(objective_of(response_kl=ResponseKL(), num_common=258))
    diagnosis.look(student, Taught(prediction=mixed(batch)), batch, counts)
    seen = diagnosis.figures(lambda tensor: tensor)
    assert float(seen["tokens/teacher_nll"]) == pytest.approx(expected, rel=1e-5)
    same = mixture_figures(mixed(batch, seeds=(2, 2)), batch, counts)["teacher_cross_entropy"]
    alone = teacher_cross_entropy(says(batch, 2, 270), batch, counts)
    assert float(same) == pytest.approx(float(alone), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "term"),
    [
        ("visual_kl", VisualKL()),
        ("relation", Relation()),
        ("response_dbild", ResponseDBiLD()),
        ("response_kl.trust", ResponseKL(trust="first")),
        ("response_kl.temperature std", ResponseKL(temperature="std")),
    ],
)
def test_a_term_that_needs_one_teacher_is_refused_by_name(name: str, term) -> None:
    batch = batch_of((0,))
    objective = objective_of(num_common=258, **{name.partition(".")[0]: term})
    with pytest.raises(ValueError, match=f"a mixture of teachers cannot serve {name}; only response_kl"):
        objective(says(batch, 1), Taught(prediction=mixed(batch)), batch, batch.counts())


def test_one_teacher_or_weights_of_another_number_are_refused() -> None:
    def ask(batch: Batch, features: Tensor | None = None) -> Prediction:
        return says(batch, 2)

    for teachers, weights in (((ask,), None), ((ask, ask), torch.zeros(3))):
        with pytest.raises(ValueError, match="several teachers are two or more, with a weight each"):
            SeveralTeachers(teachers, weights)  # type: ignore[arg-type]


# Through the loop ----


def louder(teacher: Teacher) -> Teacher:
    """Another teacher: the same model whose head points elsewhere."""
    stock = copy.deepcopy(teacher.mllm.stock)
    with torch.no_grad():
        stock.lm_head.weight.copy_(stock.lm_head.weight.flip(0) * 2)
    return Teacher(MLLM(stock), shares_tower=teacher.shares_tower)


def several(teacher: Teacher, *, copies: bool = False, by_agreement: bool = True) -> FromTeacher:
    other = teacher if copies else louder(teacher)
    return FromTeacher(SeveralTeachers((teacher, other), None if by_agreement else GIVEN))


@pytest.fixture
def run(tmp_path: Path, student_dir: Path, teacher_dir: Path) -> Run:
    made = Run(tmp_path / "run", student_dir, teacher_dir, teaching=several)
    made.objective = changed(OBJECTIVE, visual_kl=None, relation=None)
    return made


def test_a_run_goes_on_bit_for_bit(run: Run, tmp_path: Path) -> None:
    whole = replace(run, directory=tmp_path / "whole")
    whole.fit(TinyLoader())

    def crash(step: int) -> None:
        if step == 4:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        run.fit(TinyLoader(before=crash))
    assert run.fit(TinyLoader()) is None
    assert_ends_like(run, whole)
    assert 0 < run.lines()[-1]["teacher_weight/1"] < 1


def test_copies_train_as_the_teacher_alone_and_others_do_not(run: Run, tmp_path: Path) -> None:
    arms = {"alone": FromTeacher, "copies": lambda t: several(t, copies=True), "others": several}
    lines = {}
    for name, teaching in arms.items():
        arm = replace(run, directory=tmp_path / name, teaching=teaching)
        arm.fit(TinyLoader())
        lines[name] = arm.lines()
    for alone, copies in zip(lines["alone"], lines["copies"], strict=True):
        for name in {"loss", "response_kl", "teacher_cross_entropy"} & alone.keys():
            assert copies[name] == pytest.approx(alone[name], rel=1e-5), name
    assert lines["others"][0]["response_kl"] != pytest.approx(lines["alone"][0]["response_kl"], rel=1e-2)


def test_a_guard_stands_before_several_too(run: Run) -> None:
    run.teaching = lambda teacher: Guarded(several(teacher), TokenPolicy(temperature=4.0))
    assert run.fit(TinyLoader()) is None
