"""A policy for private tokens through the objective and the loop: splits, packing, resume, and what it hides.

Shape legend: B rows, T tokens, N response rows, V rows of a head.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from outside_teachings import Framed
from test_training_trainer import OBJECTIVE, Run, TinyLoader, assert_ends_like
from tiny_batches import TinyRecord, inputs, record
from tiny_objectives import changed, objective_of
from torch import Tensor

from llava_kd.batch import IGNORE_INDEX, Batch, Counts
from llava_kd.distill.diagnosis import Diagnosis
from llava_kd.distill.formulas import FORMULAS
from llava_kd.distill.objective import Objective
from llava_kd.distill.taught import Taught, TopKPrediction
from llava_kd.distill.teaching.from_teacher import FromTeacher
from llava_kd.distill.teaching.guarded import Guarded
from llava_kd.distill.terms.cross_entropy import CrossEntropy
from llava_kd.distill.terms.response_kl import ResponseKL
from llava_kd.distill.terms.visual_kl import VisualKL
from llava_kd.distill.token_policy import TokenPolicy
from llava_kd.models.mllm import Prediction

POLICY = TokenPolicy(temperature=40.0, noise=0.3, kl=0.5, cross_entropy=0.0, seed=3)
RECORDS = [record(i, images=(1, 0, 2, 1)[i], answer=3 + i) for i in range(4)]
NAMES = ("a", "b", "c", "d")
WIDTH = 8


def tagged(one: TinyRecord) -> Tensor:
    """Scores of a record's tokens: its second answer token 1, its third a half."""
    scores = torch.zeros(len(one.ids))
    first = int((one.labels != IGNORE_INDEX).nonzero()[0])
    scores[first + 1], scores[first + 2] = 1.0, 0.5
    return scores


def batch_of(*rows: tuple[int, ...], step: int = 7) -> Batch:
    """Records by number, several in a row where a row has several."""
    side = inputs(*([RECORDS[i] for i in row] for row in rows))
    scores_BT = torch.zeros(side.labels_BT.shape)
    for b, row in enumerate(rows):
        laid = torch.cat([tagged(RECORDS[i]) for i in row])
        scores_BT[b, : len(laid)] = laid
    names = tuple(NAMES[i] for row in rows for i in row)
    return Batch(student=replace(side, scores_BT=scores_BT), record_ids=names, step=step)


def says(batch: Batch, seed: int, rows: int = 260) -> Prediction:
    """A model that reads a token and its place in its record, so that the layout does not matter."""
    generator = torch.Generator().manual_seed(seed)
    table_VD = torch.randn(300, WIDTH, generator=generator)
    head_VD = torch.randn(rows, WIDTH, generator=generator)
    bias_V = torch.randn(rows, generator=generator)
    places_TD = torch.randn(500, WIDTH, generator=generator)
    side = batch.student
    hidden_BTD = table_VD[side.input_ids_BT] + places_TD[side.position_ids_BT]
    projected = torch.zeros(side.num_images, 1, WIDTH)
    return Prediction(hidden_BTD=hidden_BTD, projected_IND=projected, head_VD=head_VD, bias_V=bias_V)


def step_of(
    batches: list[Batch], objective: Objective, policy: TokenPolicy | None = POLICY
) -> tuple[float, dict[str, float], Tensor]:
    """Loss, means, and the gradient of the student's head, over the micro-batches of a step."""
    counts: Counts = sum((b.counts() for b in batches[1:]), batches[0].counts())
    total, means = 0.0, {}
    gradient_VD = torch.zeros(260, WIDTH)
    for batch in batches:
        student = says(batch, 1)
        head_VD = student.head_VD.requires_grad_()
        rows = None if policy is None else policy.of(batch)
        found = objective(student, Taught(prediction=says(batch, 2, 270), policy=rows), batch, counts)
        total += float(found.loss.detach())
        for name, value in found.means.items():
            means[name] = means.get(name, 0.0) + float(value)
        gradient_VD += torch.autograd.grad(found.loss, head_VD)[0]
    return total, means, gradient_VD


def both(losses: str, **more: object) -> Objective:
    kl = ResponseKL(temperature=2.0, **more)  # type: ignore[arg-type]
    return objective_of(cross_entropy=CrossEntropy(), response_kl=kl, num_common=258, losses=losses)


def logits(said: Prediction, b: int, t: int) -> Tensor:
    assert said.bias_V is not None
    return said.hidden_BTD[b, t] @ said.head_VD.T + said.bias_V


def by_formula(batch: Batch, policy: TokenPolicy) -> float:
    """The loss of one micro-batch without noise, row by row."""
    student, teacher = says(batch, 1), says(batch, 2, 270)
    side, total = batch.student, 0.0
    rows = (side.targets_BT != IGNORE_INDEX).nonzero().tolist()
    assert policy.temperature is not None
    for b, t in rows:
        score = float(side.scores_BT[b, t + 1])  # type: ignore[index]
        z_s = logits(student, b, t).double()
        z_t = logits(teacher, b, t).double()[:258]
        tau = 2.0 + (policy.temperature - 2.0) * score
        log_q, log_p = (z_t / tau).log_softmax(0), (z_s[:258] / 2.0).log_softmax(0)
        kl = 4.0 * float((log_q.exp() * (log_q - log_p)).sum())
        ce = -float(z_s.log_softmax(0)[side.labels_BT[b, t + 1]])
        total += (1 - (1 - policy.kl) * score) * kl + (1 - (1 - policy.cross_entropy) * score) * ce
    return total / len(rows)


@pytest.mark.parametrize("losses", FORMULAS)
@pytest.mark.parametrize("cross_entropy", [0.0, 0.25, 1.0])
def test_the_loss_is_that_of_the_formula_row_by_row(losses: str, cross_entropy: float) -> None:
    policy = replace(POLICY, noise=0.0, cross_entropy=cross_entropy)
    batch = batch_of((0,), (1, 2), (3,))
    found, means, _ = step_of([batch], both(losses), policy)
    assert found == pytest.approx(by_formula(batch, policy), rel=1e-5)
    assert found == pytest.approx(means["cross_entropy"] + means["response_kl"], rel=1e-6)


@pytest.mark.parametrize("losses", FORMULAS)
@pytest.mark.parametrize(
    "cut",
    [
        [[(0,)], [(1,)], [(2,)], [(3,)]],
        [[(3,), (1,)], [(0,), (2,)]],
        [[(0, 1, 2, 3)]],
        [[(2, 0)], [(3, 1)]],
    ],
)
def test_neither_splits_nor_packing_nor_the_order_change_a_step(losses: str, cut: list) -> None:
    whole = step_of([batch_of((0,), (1,), (2,), (3,))], both(losses))
    other = step_of([batch_of(*rows) for rows in cut], both(losses))
    assert other[0] == pytest.approx(whole[0], rel=1e-6)
    assert other[1] == pytest.approx(whole[1], rel=1e-6)
    torch.testing.assert_close(other[2], whole[2], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("losses", FORMULAS)
def test_visual_rows_of_the_same_call_are_left_alone(losses: str) -> None:
    batch = batch_of((0,), (2,))
    kl = ResponseKL(), VisualKL()
    objective = objective_of(response_kl=kl[0], visual_kl=kl[1], num_common=258, losses=losses)
    with_policy, without = (step_of([batch], objective, policy)[1] for policy in (POLICY, None))
    assert with_policy["visual_kl"] == pytest.approx(without["visual_kl"], rel=1e-6)
    assert with_policy["response_kl"] != pytest.approx(without["response_kl"], rel=1e-2)


def test_response_rows_behind_others_in_a_call_are_the_ones_that_change() -> None:
    rows = POLICY.of(batch_of((0,)))
    target = rows.target(2.0, (4,), 4 + len(rows.score_N) + 1, 258)
    assert target is not None
    assert (target.heat_N != 1).nonzero().flatten().tolist() == [5, 6]
    assert (target.noise_N != 0).nonzero().flatten().tolist() == [5, 6]
    assert target.heat_N[5:7].tolist() == [20.0, 10.5]
    assert torch.equal(target.key_N[4 : 4 + len(rows.key_N)], rows.key_N)


def test_both_forms_agree() -> None:
    batch = batch_of((0, 1), (2,), (3,))
    plain, fused = (step_of([batch], both(losses)) for losses in ("reference", "fast"))
    assert fused[0] == pytest.approx(plain[0], rel=1e-6)
    torch.testing.assert_close(fused[2], plain[2], rtol=1e-5, atol=1e-7)


def test_noise_is_drawn_anew_for_each_step_seed_record_and_place() -> None:
    batch = batch_of((0,), (1,))
    keys = POLICY.of(batch).key_N
    assert len(keys.unique()) == len(keys)
    assert bool((keys >= 0).all())
    for other in (
        POLICY.of(replace(batch, step=8)),
        replace(POLICY, seed=4).of(batch),
        POLICY.of(replace(batch, record_ids=("x", "y"))),
    ):
        assert not bool((keys == other.key_N).any())
    assert torch.equal(keys, POLICY.of(batch).key_N)


def test_a_policy_without_private_tokens_changes_nothing() -> None:
    batch = batch_of((0,), (1, 2))
    plain = replace(batch, student=replace(batch.student, scores_BT=None))
    for objective in (both("fast"), both("reference")):
        with_policy, without = (step_of([plain], objective, policy) for policy in (POLICY, None))
        assert with_policy[0] == pytest.approx(without[0], rel=1e-7)
        torch.testing.assert_close(with_policy[2], without[2], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("losses", FORMULAS)
def test_what_is_dropped_cannot_be_seen_in_loss_or_gradient(losses: str) -> None:
    """Whatever stands at a private place, as label or in the teacher, the student is the same."""
    drop = TokenPolicy(kl=0.0, cross_entropy=0.0)
    batch = batch_of((0,))
    side = batch.student
    place = int((side.scores_BT == 1).flatten().nonzero()[0])
    labels_BT = side.labels_BT.clone()
    labels_BT.view(-1)[place] = 17 if int(labels_BT.view(-1)[place]) != 17 else 18
    other = replace(batch, student=replace(side, labels_BT=labels_BT))
    first, second = (step_of([one], both(losses), drop) for one in (batch, other))
    assert first[0] == second[0]
    assert torch.equal(first[2], second[2])
    kept = [step_of([one], both(losses), replace(drop, cross_entropy=1.0))[0] for one in (batch, other)]
    assert kept[0] != kept[1], "a hard label that stays shows the token"


def test_the_hard_label_of_a_private_token_is_masked_by_default() -> None:
    batch = batch_of((0,))
    weights = TokenPolicy(temperature=50.0).of(batch).cross_entropy_N
    assert weights is not None
    assert weights.tolist() == [1.0, 0.0, 0.5]


@pytest.mark.parametrize("losses", FORMULAS)
def test_trust_and_policy_multiply(losses: str) -> None:
    policy = TokenPolicy(kl=0.25, cross_entropy=1.0)
    batch = batch_of((0,), (3,))
    objective = objective_of(response_kl=ResponseKL(trust="probability"), num_common=258, losses=losses)
    found, _, _ = step_of([batch], objective, policy)
    side, teacher, student = batch.student, says(batch, 2, 270), says(batch, 1)
    expected, rows = 0.0, (side.targets_BT != IGNORE_INDEX).nonzero().tolist()
    for b, t in rows:
        log_q = logits(teacher, b, t)[:258].log_softmax(0)
        log_p = logits(student, b, t)[:258].log_softmax(0)
        label = int(side.labels_BT[b, t + 1])
        weight = 1 - 0.75 * float(side.scores_BT[b, t + 1])  # type: ignore[index]
        expected += weight * float(log_q[label].exp() * (log_q.exp() * (log_q - log_p)).sum())
    assert found == pytest.approx(expected / len(rows), rel=1e-4)


def top_k(batch: Batch) -> TopKPrediction:
    said = says(batch, 2, 270)
    assert said.bias_V is not None
    logits_BTV = (said.hidden_BTD @ said.head_VD.T + said.bias_V)[..., :258]
    top = logits_BTV.topk(8, dim=2)
    rest_BT = logits_BTV.scatter(2, top.indices, -torch.inf).logsumexp(2)
    return TopKPrediction(logits_BTK=top.values, columns_BTK=top.indices, rest_BT=rest_BT)


def test_the_largest_logits_serve_a_policy_that_weighs_and_no_other() -> None:
    batch = batch_of((0,), (1,))
    objective = objective_of(response_kl=ResponseKL(), num_common=258, losses="fast")
    counts = batch.counts()

    def loss(policy: TokenPolicy) -> Tensor:
        taught = Taught(prediction=top_k(batch), policy=policy.of(batch))
        return objective(says(batch, 1), taught, batch, counts).loss

    whole, half = (loss(TokenPolicy(kl=kl, cross_entropy=1.0)) for kl in (1.0, 0.0))
    assert 0 < float(half) < float(whole)
    for policy in (TokenPolicy(temperature=2.0), TokenPolicy(noise=0.1)):
        with pytest.raises(ValueError, match=r"cannot serve token_policy\.temperature or noise"):
            loss(policy)


def test_a_diagnosis_sees_what_the_policy_leaves() -> None:
    batch = batch_of((0,), (1,))
    objective = objective_of(cross_entropy=CrossEntropy(), num_common=258)
    diagnosis = Diagnosis(objective)
    rows = TokenPolicy(cross_entropy=0.0).of(batch)
    everything = replace(rows, score_N=torch.ones_like(rows.score_N))
    student = says(batch, 1)
    diagnosis.look(student, Taught(prediction=says(batch, 2, 270), policy=everything), batch, batch.counts())
    assert float(diagnosis.figures(lambda tensor: tensor)["gradient/cross_entropy"]) == 0


# Through the loop ----


def spoil(step: int, batch: Batch) -> Batch:
    """As the loader gives it: with scores, and the number of its step."""
    side = batch.student
    is_target_BT = side.labels_BT != IGNORE_INDEX
    scores_BT = (is_target_BT & (side.labels_BT % 3 == 0)).float()
    return replace(batch, student=replace(side, scores_BT=scores_BT), step=step)


def guarded(inner):
    return lambda teacher: Guarded(inner(teacher), POLICY)


@pytest.fixture
def run(tmp_path: Path, student_dir: Path, teacher_dir: Path) -> Run:
    return Run(tmp_path / "run", student_dir, teacher_dir, teaching=guarded(FromTeacher))


def test_a_run_with_noise_goes_on_bit_for_bit(run: Run, tmp_path: Path) -> None:
    whole = replace(run, directory=tmp_path / "whole")
    whole.fit(TinyLoader(spoil=spoil))

    def crash(step: int) -> None:
        if step == 4:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        run.fit(TinyLoader(before=crash, spoil=spoil))
    assert run.fit(TinyLoader(spoil=spoil)) is None
    assert_ends_like(run, whole)
    assert 0 < run.lines()[-1]["private_share"] < 1


def test_a_step_is_the_same_however_it_is_cut(run: Run, tmp_path: Path) -> None:
    run.fit(TinyLoader(spoil=spoil))
    other = replace(run, directory=tmp_path / "other")
    other.fit(TinyLoader(sizes=(1, 3), spoil=spoil))
    for a, b in zip(run.lines(), other.lines(), strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() & {"loss", "cross_entropy", "response_kl", "private_share"}:
            assert a[name] == pytest.approx(b[name], rel=1e-5), name


def test_masked_labels_are_not_taken_for_a_worse_teacher(run: Run) -> None:
    run.trainer(TinyLoader())
    worse = {"teacher_cross_entropy": torch.tensor(2.0), "cross_entropy": torch.tensor(1.5)}
    for share, hears in ((0.3, False), (0.0, True)):
        teaching = Guarded(FromTeacher(run.teacher), POLICY)
        said = [teaching.advice({**worse, "private_share": torch.tensor(share)}) for _ in range(3)]
        assert (said[-1] is not None) == hears


def test_the_policy_holds_beside_a_change_of_the_pictures(run: Run) -> None:
    run.objective = changed(OBJECTIVE, visual_kl=None, relation=None)
    run.teaching = guarded(Framed)
    assert run.fit(TinyLoader(spoil=spoil)) is None
    with_policy = run.lines()[0]["cross_entropy"]
    run.directory = run.directory.with_name("plain")
    run.teaching = Framed
    run.fit(TinyLoader(spoil=spoil))
    assert with_policy < run.lines()[0]["cross_entropy"]  # masked labels add nothing to the sum
