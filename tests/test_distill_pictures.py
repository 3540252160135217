"""Changes of pictures: warps against other ways to say them, draws, the phases, and whole runs.

Shape legend: I images, C channels, H height, W width, K numbers of a change, P weights of the augmentor.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_distill_teaching import mllm
from test_training_trainer import Run, TinyLoader
from tiny_batches import inputs, record
from tiny_objectives import among, objective_of
from torch import Tensor

from llava_kd.batch import Batch, Counts
from llava_kd.distill.student import Student
from llava_kd.distill.teaching.from_teacher import FromTeacher
from llava_kd.distill.teaching.live import Teacher
from llava_kd.distill.teaching.pictures.augmentor import NOISE, Augmentor, next_phase
from llava_kd.distill.teaching.pictures.change import ChangedPictures
from llava_kd.distill.teaching.pictures.compared import Compared
from llava_kd.distill.teaching.pictures.draws import normal_of_records, records_at, records_of_images
from llava_kd.distill.teaching.pictures.hard import Hard, Pace, Room
from llava_kd.distill.teaching.pictures.mixup import Mixup, draw_pairs
from llava_kd.distill.teaching.pictures.warps import NUMBERS, Pixels, Warps
from llava_kd.distill.terms.cross_entropy import CrossEntropy
from llava_kd.losses.divergence import Divergence
from llava_kd.losses.reference import head_loss
from llava_kd.models.mllm import MLLM

AS_THEY_ARE = Pixels(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
SIGLIP = Pixels(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
ALL = Warps(translate=0.3, scale=0.3, rotate=30, crop=0.3, colour=0.3, blur=1.5)
PLACES = {"move": (0, 1), "size": (2,), "turn": (3,), "crop": (4, 5, 6), "colour": (7, 8, 9), "blur": (10,)}


def numbers(images: int, **named: tuple[float, ...]) -> Tensor:
    """Zeros but for these."""
    numbers_IK = torch.zeros(images, NUMBERS)
    for name, values in named.items():
        numbers_IK[:, PLACES[name]] = torch.tensor(values, dtype=torch.float32)
    return numbers_IK


def pictures(images: int = 2, height: int = 12, width: int = 12, seed: int = 0) -> Tensor:
    return torch.rand(images, 3, height, width, generator=torch.Generator().manual_seed(seed))


# Warps ----


def test_zeros_change_nothing() -> None:
    torch.testing.assert_close(ALL(pictures(), numbers(2), AS_THEY_ARE), pictures(), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("x", "y"), [(3, 0), (0, -2), (-4, 1)])
def test_a_move_by_whole_pixels_is_a_roll_with_the_mean_colour_behind(x: int, y: int) -> None:
    before = pictures(height=12, width=16)
    moved = Warps(translate=0.5)(before, numbers(2, move=(2 * x / 16, 2 * y / 12)), AS_THEY_ARE)
    expected = torch.zeros_like(before)
    for row in range(12):
        for column in range(16):
            if 0 <= row - y < 12 and 0 <= column - x < 16:
                expected[:, :, row, column] = before[:, :, row - y, column - x]
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("turn", "quarters"), [(1.0, 1), (-1.0, -1)])
def test_a_quarter_turn_is_one_of_the_array(turn: float, quarters: int) -> None:
    turned = Warps(rotate=90)(pictures(), numbers(2, turn=(turn,)), AS_THEY_ARE)
    torch.testing.assert_close(turned, torch.rot90(pictures(), -quarters, (2, 3)), rtol=0, atol=1e-5)


def test_a_turn_keeps_shapes_in_a_picture_that_is_no_square() -> None:
    before = torch.zeros(1, 3, 20, 40)
    before[:, :, 9:11, 14:26] = 1.0  # 12 wide, 2 high
    turned = Warps(rotate=90)(before, numbers(1, turn=(1.0,)), AS_THEY_ARE)
    rows, columns = turned[0, 0].gt(0.5).nonzero().unbind(1)
    assert (int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1) == (12, 2)


def test_twice_the_size_shows_the_middle_half() -> None:
    coarse = torch.rand(1, 3, 4, 4)
    large = coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)  # 16 x 16 in blocks of 4
    grown = Warps(scale=1.0)(large, numbers(1, size=(1.0,)), AS_THEY_ARE)
    blocks = grown[:, :, [2, 13]][:, :, :, [2, 13]]
    torch.testing.assert_close(blocks, coarse[:, :, 1:3, 1:3], rtol=0, atol=1e-5)


@pytest.mark.parametrize("corner", [(-1.0, -1.0), (1.0, 1.0), (1.0, -1.0)])
def test_a_crop_never_looks_outside_the_picture(corner: tuple[float, float]) -> None:
    ones = torch.ones(1, 3, 16, 16)
    cropped = Warps(crop=0.5)(ones, numbers(1, crop=(1.0, *corner)), AS_THEY_ARE)
    assert float(cropped[:, :, 1:-1, 1:-1].min()) == pytest.approx(1.0, abs=1e-5)
    ramp = torch.linspace(0, 1, 16).expand(1, 3, 16, 16)
    seen = Warps(crop=0.5)(ramp, numbers(1, crop=(1.0, *corner)), AS_THEY_ARE)[0, 0, 8, 1:-1].mean()
    assert float(seen) == pytest.approx(0.25 if corner[0] < 0 else 0.75, abs=0.02)


def test_colours_are_those_of_values_from_0_to_1() -> None:
    shown = pictures()
    normalised = (shown - 0.5) / 0.5
    brighter = Warps(colour=0.4)(normalised, numbers(2, colour=(0.5, 0, 0)), SIGLIP) * 0.5 + 0.5
    torch.testing.assert_close(brighter, (shown + 0.2).clamp(0, 1), rtol=0, atol=1e-5)
    grey = Warps(colour=1.0)(normalised, numbers(2, colour=(0, 0, -1)), SIGLIP) * 0.5 + 0.5
    torch.testing.assert_close(grey, shown.mean(1, keepdim=True).expand_as(shown), rtol=0, atol=1e-5)
    flat = Warps(colour=1.0)(normalised, numbers(2, colour=(0, -1, 0)), SIGLIP) * 0.5 + 0.5
    torch.testing.assert_close(flat, shown.mean((1, 2, 3), keepdim=True).expand_as(shown), rtol=0, atol=1e-5)


def test_a_blur_is_each_pictures_own_and_keeps_its_mean_inside() -> None:
    before = torch.zeros(2, 3, 21, 21)
    before[:, :, 10, 10] = 1.0
    own = numbers(2)
    own[1, 10] = 1.0
    blurred = Warps(blur=2.0)(before, own, AS_THEY_ARE)
    torch.testing.assert_close(blurred[0], before[0], rtol=0, atol=1e-5)
    away = torch.arange(21) - 10
    spread = (blurred[1, 0] * (away**2).view(-1, 1)).sum() / blurred[1, 0].sum()
    assert float(spread) == pytest.approx(4.0, rel=0.05)  # reach is three deviations
    assert float(blurred[1, 0].sum()) == pytest.approx(1.0, abs=1e-4)


def test_the_gradient_of_every_number_is_that_of_finite_differences() -> None:
    smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 4) * 0.6 + 0.2, size=16, mode="bicubic")
    weight = torch.rand(1, 3, 16, 16)
    at = 0.3 + 0.1 * torch.rand(1, NUMBERS)
    leaf = at.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((weight * ALL(smooth, leaf, AS_THEY_ARE)).sum(), leaf)
    for k in range(NUMBERS):
        step = torch.zeros(1, NUMBERS)
        step[0, k] = 2e-3
        ends = [float((weight * ALL(smooth, at + s * step, AS_THEY_ARE)).sum().double()) for s in (1, -1)]
        assert float(gradient[0, k]) == pytest.approx((ends[0] - ends[1]) / 4e-3, rel=0.1, abs=0.3), k


# Draws ----


def test_a_place_belongs_to_its_record_packed_or_padded_and_padding_to_none() -> None:
    one, two, three = record(1), record(2, images=2), record(3, images=0, answer=2)
    packed = inputs([one, two], three, pad_to=80)
    assert records_of_images(packed).tolist() == [0, 1, 1]
    of_answers = records_at(packed, packed.places.response_N).tolist()
    assert Counter(of_answers) == {0: 5, 1: 5, 2: 2}
    apart = inputs(three, one, two)
    assert records_of_images(apart).tolist() == [1, 2, 2]


def test_noise_is_that_of_the_record_the_step_and_the_seed() -> None:
    def drawn(names: tuple[str, ...], seed: int = 0, step: int = 3) -> Tensor:
        return normal_of_records(Batch(student=inputs(record(1)), record_ids=names), seed, step, 500)

    together = drawn(("a", "b", "c"))
    assert torch.equal(together[1:2], drawn(("b",)))
    for other in (drawn(("b",), seed=1), drawn(("b",), step=4), drawn(("c",))):
        assert not torch.equal(other, together[1:2])
    assert abs(float(together.mean())) < 0.1
    assert float(together.std()) == pytest.approx(1.0, abs=0.1)
    with pytest.raises(ValueError, match=r"this batch has no ids; fill in Batch\.record_ids"):
        drawn(())


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 1.0])
def test_pairs_are_drawn_without_replacement_and_as_many_as_asked(share: float) -> None:
    counts, owns = [], []
    for seed in range(300):
        pairs = draw_pairs(16, share=share, alpha=1.0, generator=np.random.default_rng(seed))
        assert len(set(pairs.mixed)) == len(pairs.mixed) == len(pairs.partners)
        assert len(set(pairs.partners)) == len(pairs.partners)
        assert all(a != b for a, b in zip(pairs.mixed, pairs.partners, strict=True))
        assert len(pairs.mixed) in {int(16 * share), int(16 * share) + 1}
        counts.append(len(pairs.mixed))
        owns += pairs.own
    assert np.mean(counts) == pytest.approx(16 * share, rel=0.1)
    if share:
        assert np.mean(owns) == pytest.approx(0.5, abs=0.05)  # Beta(1, 1) is uniform
        assert np.std(owns) == pytest.approx(12**-0.5, abs=0.03)


def test_a_picture_alone_is_mixed_with_nothing() -> None:
    alone = Batch(student=inputs(record(1)), record_ids=("a",))
    change = Mixup(share=1.0)
    assert change(alone) is alone
    assert change.label_weight(alone) is None
    for number in (0, 1):
        assert not draw_pairs(number, share=1.0, alpha=1.0, generator=np.random.default_rng(0)).mixed


@pytest.mark.parametrize(("share", "alpha"), [(1.1, 1.0), (-0.1, 1.0), (0.5, 0.0)])
def test_a_share_above_one_is_refused(share: float, alpha: float) -> None:
    with pytest.raises(ValueError, match="a share from 0 to 1 and a positive alpha"):
        Mixup(share=share, alpha=alpha)


# Phases and the augmentor ----


def test_the_phases_turn_at_the_two_thresholds_and_not_between() -> None:
    learns, seen = True, []
    for apart in (0.2, 0.4, 0.5, 0.4, 0.2, 0.1, 0.2, 0.6):
        learns = next_phase(learns=learns, disagreement=apart, lower=0.1, upper=0.5)
        seen.append(learns)
    assert seen == [True, True, False, False, False, True, True, False]


@pytest.mark.parametrize(("lower", "upper"), [(0.5, 0.1), (0.3, 0.3), (-0.1, 1.0)])
def test_thresholds_in_the_wrong_order_are_refused(lower: float, upper: float) -> None:
    with pytest.raises(ValueError, match="must lie below the upper one"):
        Pace(lower=lower, upper=upper)


def test_its_updates_are_those_of_adam_upwards() -> None:
    ours = Augmentor(lr=0.05, seed=3)
    theirs = torch.nn.Parameter(ours.weights_P.clone())
    adam = torch.optim.Adam([theirs], lr=0.05, maximize=True)
    for seed in range(5):
        gradient_P = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(seed))
        theirs.grad = gradient_P.clone()
        adam.step()
        ours.ascend(gradient_P)
        torch.testing.assert_close(ours.weights_P, theirs.detach(), rtol=1e-5, atol=1e-6)


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    augmentor = Augmentor(lr=0.05, seed=3)
    before = {name: tensor.clone() for name, tensor in augmentor.state_dict().items()}
    with pytest.raises(ValueError, match="gradient of the learned picture change is not finite"):
        augmentor.ascend(torch.full_like(augmentor.weights_P, torch.nan))
    assert all(torch.equal(before[name], tensor) for name, tensor in augmentor.state_dict().items())


def test_its_first_changes_are_small_and_differ_by_the_noise() -> None:
    augmentor, shown = Augmentor(lr=0.05, seed=3), pictures(1).expand(64, -1, -1, -1)
    numbers_IK = augmentor(shown, torch.randn(64, NOISE, generator=torch.Generator().manual_seed(0)))
    assert float(numbers_IK.abs().max()) < 0.9
    assert float(numbers_IK.std(0).min()) > 0.02


# The comparison ----


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, "std"])
def test_it_compares_as_the_losses_do_in_chunks_too(
    monkeypatch: pytest.MonkeyPatch, student_dir: Path, teacher_dir: Path, kind, temperature
) -> None:
    batch = Batch(student=inputs(record(1), record(2)), record_ids=("a", "b"))
    sides = [mllm(directory) for directory in (student_dir, teacher_dir)]
    ours, theirs = (side(batch.student, side.image_features(batch.student)) for side in sides)
    rows_N = batch.student.places.response_N
    weight_N = torch.rand(len(rows_N))
    divergence = Divergence(kind)
    expected = head_loss(
        ours.hidden_BTD.flatten(0, 1)[rows_N],
        ours.head_VD,
        torch.zeros_like(rows_N),
        ce_weight_N=torch.zeros(len(rows_N)),
        kl_weight_N=weight_N,
        teacher_NE=theirs.hidden_BTD.flatten(0, 1)[rows_N],
        teacher_head_UE=theirs.head_VD,
        num_common=260,
        divergence=divergence,
        temperature=temperature,
    ).loss
    compared = Compared(temperature=temperature, divergence=divergence, num_common=260)
    for chunk in (1 << 24, 3 * 280):
        monkeypatch.setattr("llava_kd.distill.teaching.pictures.compared._CHUNK", chunk)
        torch.testing.assert_close(compared((ours, rows_N), (theirs, rows_N), weight_N), expected)


# Whole runs ----


def hard(student: MLLM, teacher: Teacher, *, pace: Pace | None = None, **room: object) -> ChangedPictures:
    """One that learns for ever, unless `pace` says otherwise."""
    change = Hard(
        (student, teacher),
        Warps(translate=0.3, rotate=20, colour=0.2),
        Compared(num_common=260),
        Room(pixels=(SIGLIP, SIGLIP), **room),  # type: ignore[arg-type]
        pace=pace or Pace(lower=0.0, upper=1e9),
        lr=0.02,
        seed=5,
    )
    return ChangedPictures("hard", change, teacher)


def hard_of(run: Run) -> Hard:
    assert run.student.teaching is not None
    found = run.student.teaching.get_submodule("hard")
    assert isinstance(found, Hard)
    return found


ALWAYS_CHANGED = Pace(lower=0.0, upper=1e-9)  # the student's phase from the second step on


@pytest.fixture
def run(tmp_path: Path, student_dir: Path, teacher_dir: Path) -> Run:
    return Run(tmp_path / "run", student_dir, teacher_dir)


@pytest.mark.parametrize("pace", [Pace(lower=0.0, upper=1e9), ALWAYS_CHANGED], ids=["learning", "changed"])
def test_a_run_with_learned_changes_goes_on_bit_for_bit(run: Run, tmp_path: Path, pace: Pace) -> None:
    whole = replace(run, directory=tmp_path / "whole")
    for one in (run, whole):
        one.teaching = lambda teacher, one=one: hard(one.mllm, teacher, pace=pace)
    resumed = ResumedRun(run, whole)
    state = resumed.state
    assert int(state["buffer/teaching.hard.steps"]) == 5
    assert int(state["buffer/teaching.hard.augmentor.updates"]) == (5 if pace.upper > 1 else 1)
    assert bool(state["buffer/teaching.hard.augmentor.exp_avg_P"].any())
    assert not torch.equal(
        state["buffer/teaching.hard.augmentor.weights_P"], Augmentor(lr=1, seed=5).weights_P
    )


class ResumedRun:
    """`run` cut down in its fourth step and gone on, against `whole`: the same losses, weights and states."""

    def __init__(self, run: Run, whole: Run) -> None:
        whole.fit()

        def crash(step: int) -> None:
            if step == 4:
                raise RuntimeError("power cut")

        with pytest.raises(RuntimeError, match="power cut"):
            run.fit(TinyLoader(before=crash))
        assert run.fit() is None
        states = [
            load_file(one.directory / "checkpoints" / "step-00000005" / "state.safetensors")
            for one in (run, whole)
        ]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        assert [line["loss"] for line in run.lines()] == [line["loss"] for line in whole.lines()]
        self.state = states[0]


@pytest.mark.parametrize("sizes", [(4,), (1, 3), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("pace", [Pace(lower=0.0, upper=1e9), ALWAYS_CHANGED], ids=["learning", "changed"])
def test_learned_changes_do_not_depend_on_the_split(
    run: Run, tmp_path: Path, pace: Pace, sizes: tuple[int, ...]
) -> None:
    other = replace(run, directory=tmp_path / "other")
    for one in (run, other):
        one.teaching = lambda teacher, one=one: hard(one.mllm, teacher, pace=pace)
    run.fit(TinyLoader(sizes=sizes))
    other.fit()
    for a, b in zip(run.lines(), other.lines(), strict=True):
        for name in ("loss", "hard_disagreement", "hard_consistency", "hard_learning", "hard_changed"):
            # Adam's first updates have the size of lr whatever the gradient is, rounding too.
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=1e-6), name


def test_the_gradient_of_the_augmentor_is_the_same_for_every_split(run: Run) -> None:
    run.teaching = lambda teacher: hard(run.mllm, teacher)
    found = []
    for sizes in ((4,), (2, 2), (1, 3)):
        run.trainer(TinyLoader())
        group = next(TinyLoader(sizes=sizes).batches(0, 1))
        counts = reduce(add, map(run.student.counts, group))
        for batch in group:
            run.student.losses(run.student, batch, counts)
        found.append(hard_of(run)._gradient_P)
    for other in found[1:]:
        assert float((other - found[0]).norm() / found[0].norm()) < 1e-4


BATCH = Batch(student=inputs(record(1), record(2, images=2), record(3)), record_ids=("a", "b", "c"))


def test_while_it_learns_the_student_trains_on_the_pictures_as_they_are(run: Run, tmp_path: Path) -> None:
    plain = replace(run, directory=tmp_path / "plain")
    plain.fit()
    run.teaching = lambda teacher: hard(run.mllm, teacher)
    run.fit()
    for name, value in plain.weights().items():
        assert torch.equal(run.weights()[name], value), name
    assert all(line["hard_learning"] == pytest.approx(1.0) for line in run.lines())


def test_the_student_trains_on_the_changed_pictures_in_its_phase(run: Run) -> None:
    """As a teacher and a student that are handed them."""
    run.teaching = lambda teacher: hard(run.mllm, teacher, pace=ALWAYS_CHANGED)
    trainer = run.trainer(TinyLoader())
    trainer.step([BATCH], 0)
    found = hard_of(run)
    assert not found.learns
    counts = run.student.counts(BATCH)
    loss, means = run.student.losses(run.student, BATCH, counts)
    changed = found.changed(BATCH)
    assert not torch.equal(changed.student.pixels_ICHW, BATCH.student.pixels_ICHW)
    plain = Student(run.mllm, run.objective, FromTeacher(run.teacher))
    expected, _ = plain.losses(plain, changed, plain.counts(changed))
    torch.testing.assert_close(loss, expected)
    assert float(means["hard_disagreement"]) == pytest.approx(float(means["response_kl"]), rel=1e-4)


def reach_of(student: MLLM, teacher: Teacher, found: Hard, weights_P: Tensor) -> Tensor:
    """What the augmentor is to raise, from the formula and both models in plain words."""
    changed = found.changed(BATCH, weights_P)

    def logp(model: MLLM, batch: Batch) -> Tensor:
        said = model(batch.student, model.image_features(batch.student))
        logits_NV = (said.hidden_BTD @ said.head_VD.T).flatten(0, 1)[BATCH.student.places.response_N]
        return logits_NV[:, :260].log_softmax(1)

    ours, theirs, before = logp(student, changed), logp(teacher.mllm, changed), logp(teacher.mllm, BATCH)
    apart = (theirs.exp() * (theirs - ours)).sum(1).mean()
    strayed = (before.exp() * (before - theirs)).sum(1).mean()
    return 2.0 * apart - 0.5 * strayed


def test_its_gradient_goes_up_the_disagreement_through_both_models(run: Run) -> None:
    pace = Pace(student=2.0, teacher=0.5, lower=0.0, upper=1e9)
    run.teaching = lambda teacher: hard(run.mllm, teacher, pace=pace)
    run.trainer(TinyLoader())
    found = hard_of(run)
    run.mllm.eval()
    leaf = found.augmentor.leaf()
    (expected_P,) = torch.autograd.grad(reach_of(run.mllm, run.teacher, found, leaf), leaf)
    loss, _ = run.student.losses(run.student, BATCH, run.student.counts(BATCH))
    loss.backward()
    assert found._gradient_P is not None
    torch.testing.assert_close(found._gradient_P, expected_P, rtol=1e-3, atol=1e-6)
    assert float(expected_P.norm()) > 0


def test_what_is_kept_is_not_changed_and_does_not_count(run: Run) -> None:
    run.teaching = lambda teacher: hard(run.mllm, teacher, pace=ALWAYS_CHANGED, kept=frozenset({"b"}))
    run.trainer(TinyLoader()).step([BATCH], 0)
    found = hard_of(run)
    same_I = [
        torch.equal(a, b)
        for a, b in zip(found.changed(BATCH).student.pixels_ICHW, BATCH.student.pixels_ICHW, strict=True)
    ]
    assert same_I == [False, True, True, False]
    assert float(run.student.counts(BATCH)["changed_tokens"]) == 10
    text = Batch(student=inputs(record(1), record(4, images=0)), record_ids=("a", "d"))
    assert float(run.student.counts(text)["changed_tokens"]) == 5


@pytest.mark.parametrize("pace", [Pace(lower=0.0, upper=1e9), ALWAYS_CHANGED], ids=["learning", "changed"])
@pytest.mark.parametrize("kind", ["hard", "mixup"])
def test_text_alone_is_trained_on_and_moves_nothing_of_the_change(run: Run, kind: str, pace: Pace) -> None:
    text = Batch(student=inputs(record(1, images=0), record(2, images=0)), record_ids=("a", "b"))
    run.teaching = lambda teacher: (
        hard(run.mllm, teacher, pace=pace)
        if kind == "hard"
        else ChangedPictures("mixup", Mixup(share=1.0), teacher)
    )
    trainer = run.trainer(TinyLoader())
    before = run.weights()
    first = {name: t.clone() for name, t in run.student.state().items()}
    result = trainer.step([text], 0)
    assert bool(torch.isfinite(result.means["loss"]))
    assert any(not torch.equal(before[name], value) for name, value in run.weights().items())
    for name, tensor in run.student.state().items():
        assert torch.equal(tensor, first[name]) or name.endswith((".steps", ".updates")), name


@pytest.mark.parametrize("row", [{"answer": 0}, {"is_valid": False}], ids=["no answer", "bad picture"])
def test_a_picture_without_a_target_teaches_the_augmentor_nothing(run: Run, row: dict) -> None:
    run.teaching = lambda teacher: hard(run.mllm, teacher)
    trainer = run.trainer(TinyLoader())
    silent = Batch(student=inputs(record(1, **row)), record_ids=("a",))
    before = hard_of(run).augmentor.weights_P.clone()
    result = trainer.step([silent], 0)
    assert float(result.means["hard_changed"]) == 0.0
    assert hard_of(run).learns
    assert torch.equal(hard_of(run).augmentor.weights_P, before)


def test_the_pictures_are_shown_once_a_step_that_is_due(run: Run) -> None:
    seen: list[tuple[int, bool, bool]] = []

    def show(step: int, before: Tensor, after: Tensor) -> None:
        seen.append((step, before.shape == after.shape, torch.equal(before, after)))

    run.teaching = lambda teacher: hard(run.mllm, teacher, show=show, show_every=2)
    run.fit(TinyLoader(sizes=(1, 3)))
    assert seen == [(2, True, False), (4, True, False)]


def test_another_change_of_the_pictures_does_not_go_on_from_this_one(run: Run) -> None:
    run.teaching = lambda teacher: hard(run.mllm, teacher)
    run.fit()
    run.teaching = lambda teacher: ChangedPictures("mixup", Mixup(share=0.5), teacher)
    with pytest.raises(ValueError, match=r"only one has 'buffer/teaching\.hard\."):
        run.fit()


# Mixup ----


def test_a_run_with_mixup_goes_on_bit_for_bit(run: Run, tmp_path: Path) -> None:
    whole = replace(run, directory=tmp_path / "whole")
    for one in (run, whole):
        one.teaching = lambda teacher: ChangedPictures("mixup", Mixup(share=0.6), teacher)
    assert int(ResumedRun(run, whole).state["buffer/teaching.mixup.steps"]) == 5


def test_mixed_pictures_are_the_blends_of_their_pairs_on_both_sides() -> None:
    other = inputs(record(1), record(2, images=2), record(3))
    small = replace(other, pixels_ICHW=torch.nn.functional.avg_pool2d(other.pixels_ICHW, 2))
    change = Mixup(share=0.5)
    both = replace(BATCH, teacher=small)
    pairs, mixed = change.pairs(both), change(both)
    assert len(pairs.mixed) == 2
    assert mixed.teacher is not None
    for before, after in ((BATCH.student, mixed.student), (small, mixed.teacher)):
        expected = before.pixels_ICHW.clone()
        for i, j, own in zip(pairs.mixed, pairs.partners, pairs.own, strict=True):
            expected[i] = own * before.pixels_ICHW[i] + (1 - own) * before.pixels_ICHW[j]
        torch.testing.assert_close(after.pixels_ICHW, expected)


def test_pairs_are_those_of_the_seed_the_step_and_the_records() -> None:
    def pairs(seed: int = 0, steps: int = 0, names: tuple[str, ...] = ("a", "b", "c")) -> list[float]:
        change = Mixup(share=1.0, seed=seed)
        for _ in range(steps):
            change.after_step({})
        return list(change.pairs(replace(BATCH, record_ids=names)).own)

    assert pairs() == pairs()
    different = [pairs(), pairs(seed=1), pairs(steps=1), pairs(steps=2), pairs(names=("a", "c", "b"))]
    assert len({tuple(own) for own in different}) == 5


def test_labels_of_mixed_records_do_not_count_and_the_teacher_does(run: Run) -> None:
    """The step's loss, from one record at a time: no label of a mixed one, the teacher of all of them."""
    run.teaching = lambda teacher: ChangedPictures("mixup", Mixup(share=0.5), teacher)
    run.trainer(TinyLoader())
    run.mllm.eval()
    assert run.student.teaching is not None
    change = run.student.teaching.get_submodule("mixup")
    assert isinstance(change, Mixup)
    records = set(records_of_images(BATCH.student)[list(change.pairs(BATCH).mixed)].tolist())
    assert 0 < len(records) < 3
    mixed = change(BATCH)
    counts = run.student.counts(BATCH)
    ours = among(run.objective, "cross_entropy", "response_kl")
    run.student.objective = ours
    loss, means = run.student.losses(run.student, BATCH, counts)
    plain = Student(run.mllm, ours, FromTeacher(run.teacher))
    _, alone = plain.losses(plain, mixed, plain.counts(mixed))
    torch.testing.assert_close(means["response_kl"], alone["response_kl"])
    expected, start = 0.0, 0
    num_labelled = 5 * (3 - len(records))
    for number, (item, images) in enumerate(((record(1), 1), (record(2, images=2), 2), (record(3), 1))):
        pixels_ICHW = mixed.student.pixels_ICHW[start : start + images]
        start += images
        if number not in records:
            one = Batch(student=replace(inputs(item), pixels_ICHW=pixels_ICHW), record_ids=("x",))
            own = plain.losses(plain, one, plain.counts(one))[1]["cross_entropy"]
            expected += float(own) * 5 / num_labelled
    assert float(means["cross_entropy"]) == pytest.approx(expected, rel=1e-4)
    assert float(loss.detach()) == pytest.approx(expected + float(means["response_kl"]), rel=1e-4)
    assert float(means["mixed_tokens"]) == pytest.approx(5 * len(records) / 15)


@pytest.mark.parametrize("losses", ["reference", "fast"])
def test_the_gradient_of_mixed_labels_is_nothing(run: Run, losses: str) -> None:
    """With every picture mixed, cross-entropy moves nothing at all."""
    run.objective = objective_of(cross_entropy=CrossEntropy(), num_common=260, losses=losses)
    run.teaching = lambda teacher: ChangedPictures("mixup", Mixup(share=1.0), teacher)
    run.trainer(TinyLoader())
    loss, _ = run.student.losses(run.student, BATCH, Counts(run.student.counts(BATCH)))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not any(bool(p.grad.any()) for p in run.student.parameters() if p.grad is not None)
