"""Tokens that need the picture, through objective and loop: formula, splits, packing, a blind teacher.

Shape legend: B rows, T tokens, I images, N response rows, V rows of a head, D width.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_distill_token_policy import both, logits, says
from test_training_trainer import OBJECTIVE, Run, TinyLoader, assert_ends_like
from tiny_batches import inputs, record
from tiny_objectives import changed
from torch import Tensor

from llava_kd.batch import IGNORE_INDEX, Batch, Counts
from llava_kd.distill.formulas import FORMULAS
from llava_kd.distill.objective import Objective
from llava_kd.distill.taught import Taught
from llava_kd.distill.teaching.from_teacher import FromTeacher
from llava_kd.distill.teaching.guarded import Guarded
from llava_kd.distill.teaching.live import Teacher
from llava_kd.distill.teaching.pictures.withheld import withheld
from llava_kd.distill.teaching.several import SeveralTeachers
from llava_kd.distill.teaching.visual_dependency import VisuallyWeighed, Weighing
from llava_kd.distill.terms.response_kl import ResponseKL
from llava_kd.distill.token_policy import TokenPolicy
from llava_kd.losses.targets.mixture import Voice
from llava_kd.models.files.checkpoint import load_stock
from llava_kd.models.mllm import MLLM, Prediction

RECORDS = [record(i, images=(1, 0, 2, 1)[i], answer=(6, 5, 11, 1)[i]) for i in range(4)]
WEIGHING = Weighing(by="va", top=0.3, mass=0.8)
CUTS = [
    [[(0,)], [(1,)], [(2,)], [(3,)]],
    [[(3,), (1,)], [(0,), (2,)]],
    [[(0, 1, 2, 3)]],
    [[(2, 0)], [(3, 1)]],
]


def batch_of(*rows: tuple[int, ...]) -> Batch:
    """Records by number, several in a row where a row has several; 1 has no picture, 3 a target alone."""
    side = inputs(*([RECORDS[i] for i in row] for row in rows))
    return Batch(student=side, record_ids=tuple(str(i) for row in rows for i in row))


def looks(batch: Batch, features_INE: Tensor | None = None, *, is_blind: bool = False) -> Prediction:
    """A teacher that reads a token, its place in its record, and the sum of the record's pictures."""
    said = says(batch, 2, 270)
    side = batch.student
    record_BT = ((side.position_ids_BT == 0) & (side.segment_ids_BT > 0)).flatten().cumsum(0) - 1
    per_image = 16
    record_I = record_BT[side.visual_BT.flatten().nonzero().squeeze(1)][::per_image]
    sums_I = side.pixels_ICHW.sum((1, 2, 3)) / 50
    seen_R = torch.zeros(int(record_BT.max()) + 1).index_add(0, record_I, 0 * sums_I if is_blind else sums_I)
    seen_BT = seen_R[record_BT.clamp_min(0)].view_as(side.input_ids_BT)
    way_D = torch.randn(8, generator=torch.Generator().manual_seed(5))
    shift_BTD = seen_BT[..., None] * way_D * torch.cos(side.input_ids_BT.float())[..., None]
    return replace(said, hidden_BTD=said.hidden_BTD + shift_BTD)


def step_of(batches: list[Batch], objective: Objective, teaching: FromTeacher) -> tuple:
    """Loss, means with the figures, and the gradient of the student's head, over a step's micro-batches."""
    counts: Counts = sum((b.counts() for b in batches[1:]), batches[0].counts())
    total, means, gradient_VD = 0.0, {}, torch.zeros(260, 8)
    for batch in batches:
        student = says(batch, 1)
        head_VD = student.head_VD.requires_grad_()
        taught = teaching.outside(batch, None)
        found = objective(student, taught, batch, counts)
        total += float(found.loss.detach())
        for name, value in {**found.means, **teaching.figures(batch, taught, counts)}.items():
            means[name] = means.get(name, 0.0) + float(value)
        gradient_VD += torch.autograd.grad(found.loss, head_VD)[0]
    return total, means, gradient_VD


def by_formula(batch: Batch, weighing: Weighing) -> float:
    """Row by row, one record a row of the batch."""
    grey = replace(batch, student=replace(batch.student, pixels_ICHW=0 * batch.student.pixels_ICHW))
    student, seen, unseen = says(batch, 1), looks(batch), looks(grey)
    labels_BT, total, number = batch.student.labels_BT, 0.0, 0
    for b in range(len(labels_BT)):
        places = [t for t in range(labels_BT.shape[1] - 1) if labels_BT[b, t + 1] != IGNORE_INDEX]
        score = []
        for t in places:
            log_q = logits(seen, b, t).double().log_softmax(0)
            gain = log_q - logits(unseen, b, t).double().log_softmax(0)
            label = int(labels_BT[b, t + 1])
            score.append(
                float((log_q.exp() * gain).sum() if weighing.by == "vds" else gain[label].clamp_min(0))
            )
        n, k = len(places), math.ceil(weighing.top * len(places) - 1e-9)
        chosen = sorted(range(n), key=lambda i: -score[i])[:k]
        chosen = [i for i in chosen if score[i] > 1e-12] if bool(batch.student.visual_BT[b].any()) else []
        heavy = max(1.0, weighing.mass * n / k)
        light = (n - len(chosen) * heavy) / max(1, n - len(chosen))
        for i, t in enumerate(places):
            z_s = logits(student, b, t).double()
            log_q = (logits(seen, b, t).double()[:258] / 2).log_softmax(0)
            log_p = (z_s[:258] / 2).log_softmax(0)
            kl = 4.0 * float((log_q.exp() * (log_q - log_p)).sum())
            total += (heavy if i in chosen else light) * kl - float(z_s.log_softmax(0)[labels_BT[b, t + 1]])
        number += n
    return total / number


@pytest.mark.parametrize("losses", FORMULAS)
@pytest.mark.parametrize("weighing", [WEIGHING, Weighing(by="vds", top=0.3, mass=1.0)])
def test_the_loss_is_that_of_the_formula_row_by_row(losses: str, weighing: Weighing) -> None:
    batch = batch_of((0,), (1,), (2,), (3,))
    found, means, _ = step_of([batch], both(losses), VisuallyWeighed(weighing, looks))
    assert found == pytest.approx(by_formula(batch, weighing), rel=1e-5)
    plain = step_of([batch], both(losses), FromTeacher(looks))
    assert found != pytest.approx(plain[0], rel=1e-3)
    assert means["cross_entropy"] == pytest.approx(plain[1]["cross_entropy"], rel=1e-6)  # labels weigh alike
    assert means["visual_dependency"] > 0
    assert 0 < means["visual_tokens_share"] < 0.5


@pytest.mark.parametrize("losses", FORMULAS)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("weighing", [WEIGHING, Weighing(by="vds", top=0.3, mass=1.0)])
def test_neither_splits_nor_packing_nor_the_order_change_a_step(
    losses: str, cut: list, weighing: Weighing
) -> None:
    teaching = VisuallyWeighed(weighing, looks)
    whole = step_of([batch_of((0,), (1,), (2,), (3,))], both(losses), teaching)
    other = step_of([batch_of(*rows) for rows in cut], both(losses), teaching)
    assert other[0] == pytest.approx(whole[0], rel=1e-5)
    assert other[1] == pytest.approx(whole[1], rel=1e-5)
    torch.testing.assert_close(other[2], whole[2], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("by", ["vds", "va"])
def test_of_a_blind_teacher_all_tokens_weigh_alike(by: str) -> None:
    def blind(batch: Batch, features_INE: Tensor | None = None) -> Prediction:
        return looks(batch, is_blind=True)

    batch = batch_of((0, 1), (2,), (3,))
    weighing = Weighing(by=by, top=0.2, mass=1.0)  # type: ignore[arg-type]
    taught = VisuallyWeighed(weighing, blind).outside(batch, None)
    assert taught.dependency is not None
    assert taught.dependency.weight_N.tolist() == [1.0] * 23
    ours, plain = (
        step_of([batch], both("fast"), t) for t in (VisuallyWeighed(weighing, blind), FromTeacher(blind))
    )
    assert ours[0] == pytest.approx(plain[0], rel=1e-7)
    assert ours[1]["visual_dependency"] == 0


def test_records_without_a_readable_picture_weigh_alike() -> None:
    broken = replace(RECORDS[2], is_valid=False)  # its labels stay, so that its rows can be seen
    side = inputs(RECORDS[1], broken, RECORDS[0])
    taught = VisuallyWeighed(WEIGHING, looks).outside(Batch(student=side), None)
    assert taught.dependency is not None
    assert taught.dependency.weight_N[:16].tolist() == [1.0] * 16
    assert taught.dependency.score_N[:16].tolist() == [0.0] * 16
    assert taught.dependency.weight_N[16:].unique().numel() == 2


def test_a_batch_of_text_alone_or_without_a_target_is_as_it_was() -> None:
    text = batch_of((1,))
    ours, plain = (
        step_of([text], both("fast"), t) for t in (VisuallyWeighed(WEIGHING, looks), FromTeacher(looks))
    )
    assert ours[0] == plain[0]
    labels_BT = torch.full_like(text.student.labels_BT, IGNORE_INDEX)
    masked = replace(text, student=replace(text.student, labels_BT=labels_BT))
    assert step_of([masked], both("fast"), VisuallyWeighed(WEIGHING, looks))[0] == 0


def test_rows_that_two_vocabularies_answer_otherwise_are_no_part_of_the_weights() -> None:
    batch = batch_of((0,))
    labels_BT = batch.student.labels_BT.clone()
    places = (labels_BT[0] != IGNORE_INDEX).nonzero().squeeze(1)
    labels_BT[0, places[0]] += 1
    two = replace(batch, teacher=replace(batch.student, labels_BT=labels_BT))
    seen, unseen = looks(batch), looks(replace(batch, student=replace(
        batch.student, pixels_ICHW=0 * batch.student.pixels_ICHW)))  # fmt: skip
    weight_N = WEIGHING.of(two, seen, unseen).weight_N
    assert float(weight_N[1:].sum()) == pytest.approx(5, rel=1e-6)
    assert float(weight_N[1:].max()) == pytest.approx(0.8 * 5 / 2)


def test_under_a_policy_for_private_tokens_both_weights_count() -> None:
    batch = batch_of((0,), (2,))
    scores_BT = (batch.student.labels_BT % 2 == 1).float() * (batch.student.labels_BT != IGNORE_INDEX)
    batch = replace(batch, student=replace(batch.student, scores_BT=scores_BT))
    inner, student = VisuallyWeighed(WEIGHING, looks), says(batch, 1)
    guarded = Guarded(inner, TokenPolicy(kl=0.0, cross_entropy=1.0))
    taught = guarded.inside(batch, student, torch.zeros(0), guarded.outside(batch, None))
    assert taught.dependency is not None
    kept_N = 1 - batch.student.target_scores_N
    assert 0 < kept_N.sum() < len(kept_N)
    by_hand = replace(taught.dependency, weight_N=taught.dependency.weight_N * kept_N, drops_rows=True)
    alone = Taught(prediction=taught.prediction, dependency=by_hand)
    found, expected = (both("fast")(student, t, batch, batch.counts()).loss for t in (taught, alone))
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


def test_the_teacher_is_asked_last_with_the_pictures_as_they_are() -> None:
    batch, asked = batch_of((0,)), []

    def ask(batch: Batch, features_INE: Tensor | None = None) -> Prediction:
        asked.append((float(batch.teacher_inputs.pixels_ICHW.abs().sum()), features_INE))
        return looks(batch)

    features = torch.ones(1, 2, 3)
    for two in (batch, replace(batch, teacher=batch.student)):
        VisuallyWeighed(WEIGHING, ask).outside(two, features)
    assert [grey for grey, _ in asked[::2]] == [0, 0]
    assert all(given is None for _, given in asked[::2])
    assert all(pixels > 0 and given is features for pixels, given in asked[1::2])


@pytest.mark.parametrize("kind", ["grey", "pixelated", "blurred"])
def test_withheld_pictures_keep_their_mean_and_lose_their_detail(kind) -> None:
    pixels_ICHW = torch.randn(2, 3, 32, 24, generator=torch.Generator().manual_seed(0))
    found = withheld(pixels_ICHW, kind, cells=4)
    assert found.shape == pixels_ICHW.shape
    assert float(found.std()) < 0.3
    flat = torch.full((1, 3, 32, 24), 0.5)
    expected = 0 * flat if kind == "grey" else flat
    torch.testing.assert_close(withheld(flat, kind, cells=4), expected)
    assert withheld(pixels_ICHW[:0], kind).shape == (0, 3, 32, 24)
    assert withheld(pixels_ICHW.bfloat16(), kind).dtype == torch.bfloat16
    if kind == "pixelated":
        mean_IC11 = pixels_ICHW[:, :, :8, :6].mean((2, 3), keepdim=True)
        torch.testing.assert_close(found[:, :, :8, :6], mean_IC11.expand(2, 3, 8, 6))


def test_shares_that_make_no_sense_and_several_teachers_are_refused() -> None:
    for more in ({"top": 0.0}, {"top": 0.6, "mass": 0.5}, {"mass": 1.5}, {"top": math.nan}):
        with pytest.raises(ValueError, match="top must be above 0 and at most mass"):
            Weighing(**more)  # type: ignore[arg-type]
    mixture = SeveralTeachers((looks, looks), torch.zeros(2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="takes one teacher, and a live one"):
        VisuallyWeighed(WEIGHING, mixture).outside(batch_of((0,)), None)


# A further target ----


class Contrasted(VisuallyWeighed):
    """With a student that reads pictures as the teacher of these tests does, by other weights."""

    def outside(self, batch: Batch, features_INE: Tensor | None) -> Taught:
        taught = super().outside(batch, features_INE)
        assert taught.dependency is not None
        own = says(batch, 9)
        voice = Voice(own.hidden_BTD.flatten(0, 1)[batch.student.places.response_N], own.head_VD, own.bias_V)
        return replace(taught, dependency=replace(taught.dependency, own=voice, gamma=2.0))


@pytest.mark.parametrize("losses", FORMULAS)
@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_a_further_target_does_not_depend_on_splits_or_packing(losses: str, kind: str) -> None:
    teaching, objective = Contrasted(WEIGHING, looks), both(losses, divergence=kind)
    whole = step_of([batch_of((0,), (1,), (2,), (3,))], objective, teaching)
    without = step_of([batch_of((0,), (1,), (2,), (3,))], objective, VisuallyWeighed(WEIGHING, looks))
    assert whole[0] != pytest.approx(without[0], rel=1e-2)
    for cut in CUTS:
        other = step_of([batch_of(*rows) for rows in cut], objective, teaching)
        assert other[0] == pytest.approx(whole[0], rel=1e-5)
        torch.testing.assert_close(other[2], whole[2], rtol=1e-5, atol=1e-6)


def test_the_students_habit_is_what_it_says_of_grey_pictures(student_dir: Path) -> None:
    batch, student = batch_of((0, 2), (3,)), MLLM(load_stock(str(student_dir)).stock)
    teaching = VisuallyWeighed(replace(WEIGHING, gamma=1.0), looks, student=student)
    features_INE = student.image_features(batch.student)
    said = student(batch.student, features_INE)
    found = teaching.inside(batch, said, features_INE, teaching.outside(batch, None)).dependency
    grey = replace(batch.student, pixels_ICHW=0 * batch.student.pixels_ICHW)
    rows_N = grey.places.response_N
    expected_BTD = student(grey, student.image_features(grey)).hidden_BTD
    assert found is not None
    assert found.own is not None
    assert not found.own.hidden_NE.requires_grad
    torch.testing.assert_close(found.own.hidden_NE, expected_BTD.flatten(0, 1)[rows_N])
    assert not torch.allclose(found.own.hidden_NE, said.hidden_BTD.flatten(0, 1)[rows_N], atol=1e-3)


def test_a_further_target_leaves_text_alone_as_it_was() -> None:
    ours, plain = (
        step_of([batch_of((1,))], both("fast"), t) for t in (Contrasted(WEIGHING, looks), FromTeacher(looks))
    )
    assert ours[0] == pytest.approx(plain[0], rel=1e-6)


def test_a_further_target_is_refused_what_it_is_not_made_for() -> None:
    batch = batch_of((0,))
    taught, student = Contrasted(WEIGHING, looks).outside(batch, None), says(batch, 1)
    for more in ({"divergence": "jsd"}, {"temperature": "std"}):
        objective = changed(both("fast"), response_kl=ResponseKL(**more))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="a number as temperature and the divergence `forward`"):
            objective(student, taught, batch, batch.counts())
    assert taught.dependency is not None
    alone = replace(taught, dependency=replace(taught.dependency, own=None))
    with pytest.raises(ValueError, match="needs the student's own reading"):
        both("fast")(student, alone, batch, batch.counts())
    with pytest.raises(ValueError, match="gamma needs the student"):
        VisuallyWeighed(Weighing(gamma=1.0), looks)
    with pytest.raises(ValueError, match="gamma must be a number from 0 on"):
        Weighing(gamma=-1.0)


# Through the loop ----


@pytest.fixture
def run(tmp_path: Path, student_dir: Path, teacher_dir: Path) -> Run:
    def teaching(teacher: Teacher) -> FromTeacher:
        return VisuallyWeighed(WEIGHING, teacher)

    made = Run(tmp_path / "run", student_dir, teacher_dir, teaching=teaching)
    made.objective = changed(OBJECTIVE, relation=None)
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
    assert run.lines()[-1]["visual_dependency"] > 0
