"""The door to whoever teaches: other ways to teach come in by it, through the trainer as it is.

Shape legend: V rows of a head and other sizes as in `outside_teachings`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from outside_teachings import (
    Contrasted,
    Framed,
    MeanOfLogits,
    Peer,
    RowTemperatures,
    temperatures,
)
from safetensors.torch import load_file
from test_training_trainer import Run, TinyLoader, assert_ends_like
from tiny_batches import inputs, record
from tiny_llava import make_tiny_llava
from tiny_objectives import among
from torch import Tensor

from llava_kd.batch import Batch, Counts
from llava_kd.distill.teaching.door import Teaching
from llava_kd.distill.teaching.from_teacher import FromTeacher
from llava_kd.distill.teaching.live import Teacher
from llava_kd.models.files.checkpoint import load_stock
from llava_kd.models.mllm import MLLM, Prediction
from llava_kd.parallel.world import World
from llava_kd.training.sums import Sums

BATCH = Batch(student=inputs(record(1), record(2, images=2)), record_ids=("a", "b"))
ALONE = World(rank=0, size=1, device=torch.device("cpu"))


@pytest.fixture
def run(tmp_path: Path, student_dir: Path, teacher_dir: Path) -> Run:
    return Run(tmp_path / "run", student_dir, teacher_dir)


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("other") / "model", hidden=40, vocab_size=280, seed=6)


def mllm(directory: Path, *trainable: str) -> MLLM:
    return MLLM(load_stock(str(directory)).stock, trainable=trainable)


def logits(prediction: object) -> Tensor:
    assert isinstance(prediction, Prediction)
    return prediction.hidden_BTD @ prediction.head_VD.T


# Ways to teach that stand in a test alone ----


def test_a_mixture_of_two_teachers_says_the_mean_of_their_logits(
    run: Run, teacher_dir: Path, other_dir: Path
) -> None:
    other = Teacher(mllm(other_dir), shares_tower=False)
    one = Teacher(mllm(teacher_dir), shares_tower=False)
    mixed = FromTeacher(MeanOfLogits([one, other]))
    mean_BTV = (logits(one(BATCH)) + logits(other(BATCH))) / 2
    torch.testing.assert_close(logits(mixed.outside(BATCH, None).prediction), mean_BTV)
    run.teaching = lambda teacher: FromTeacher(MeanOfLogits([teacher, other]))
    assert run.fit() is None
    assert {"response_kl", "visual_kl", "relation", "teacher_cross_entropy"} <= run.lines()[-1].keys()


def test_a_mixture_of_a_teacher_with_itself_teaches_as_it_does_alone(run: Run, tmp_path: Path) -> None:
    alone = replace(run, directory=tmp_path / "alone")
    alone.fit()
    run.teaching = lambda teacher: FromTeacher(MeanOfLogits([teacher, teacher]))
    run.fit()
    for a, b in zip(run.lines(), alone.lines(), strict=True):
        for name in ("loss", "response_kl", "visual_kl", "relation"):
            assert a[name] == pytest.approx(b[name], rel=1e-4), name


def moved(run: Run, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in run.weights().items() if not torch.equal(value, before[name])}


def test_a_peer_learns_beside_the_student_and_stands_in_the_checkpoint(
    run: Run, tmp_path: Path, student_dir: Path
) -> None:
    parts = ("multi_modal_projector", "language_model")
    run.teaching = lambda _: Peer(mllm(student_dir, *parts))
    trainer = run.trainer(TinyLoader())
    before = run.weights()
    assert trainer.fit() is None
    ours = {name for name in before if name.startswith("mllm.")}
    theirs = {name.replace("mllm.", "teaching.", 1) for name in ours}
    assert moved(run, before) == ours | theirs == before.keys()
    state = load_file(run.directory / "checkpoints" / "step-00000005" / "state.safetensors")
    assert {f"exp_avg/{name}" for name in theirs} <= state.keys()
    first = run.lines()[0]
    assert first["peer_cross_entropy"] == pytest.approx(first["cross_entropy"], rel=1e-5)  # the same at first


def test_a_run_with_a_peer_goes_on_bit_for_bit(run: Run, tmp_path: Path, student_dir: Path) -> None:
    run.teaching = lambda _: Peer(mllm(student_dir, "multi_modal_projector", "language_model"))
    assert_resumes(run, tmp_path)


def assert_resumes(run: Run, tmp_path: Path) -> None:
    whole = replace(run, directory=tmp_path / "whole")
    whole.fit()

    def crash(step: int) -> None:
        if step == 4:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        run.fit(TinyLoader(before=crash))
    assert run.fit() is None
    assert_ends_like(run, whole)


def test_a_learned_change_of_the_pictures_moves_and_its_state_is_in_the_checkpoint(
    run: Run, tmp_path: Path
) -> None:
    run.teaching = Framed
    assert_resumes(run, tmp_path)
    state = load_file(run.directory / "checkpoints" / "step-00000005" / "state.safetensors")
    assert int(state["buffer/teaching.uses"]) == 10  # two micro-batches of five steps
    assert bool(state["parameter/teaching.picture_CHW"].any())


def test_another_state_of_the_teaching_is_refused(run: Run) -> None:
    run.teaching = Framed
    run.fit()
    run.teaching = FromTeacher
    with pytest.raises(ValueError, match=r"only one has 'buffer/teaching\.uses'"):
        run.fit()


def test_a_change_of_the_pictures_that_changes_nothing_costs_nothing(run: Run, tmp_path: Path) -> None:
    alone = replace(run, directory=tmp_path / "alone")
    alone.fit()

    def still(teacher: Teacher) -> Teaching:
        framed = Framed(teacher)
        framed.frame.requires_grad_(False)
        return framed

    run.teaching = still
    run.fit()
    for name, value in alone.weights().items():
        assert torch.equal(run.weights()[name], value), name


def test_the_gradient_of_a_change_of_the_pictures_is_that_of_finite_differences(run: Run) -> None:
    run.teaching = Framed
    run.trainer(TinyLoader())
    student = run.student.double().eval()
    run.teacher.mllm.stock.double()
    student.mllm.stock.double()
    pixels_ICHW = BATCH.student.pixels_ICHW.double()
    batch = replace(BATCH, student=replace(BATCH.student, pixels_ICHW=pixels_ICHW))
    frame = student.get_parameter("teaching.picture_CHW")

    def loss() -> Tensor:
        return student.losses(student, batch, student.counts(batch))[0]

    run.student.objective = among(run.student.objective, "cross_entropy")
    loss().backward()
    gradient = frame.grad
    assert gradient is not None
    step = 1e-3 * gradient / gradient.norm()
    with torch.no_grad():
        frame += step
        above = loss()
        frame -= 2 * step
        below = loss()
    assert float(above - below) == pytest.approx(float(2 * (step * gradient).sum()), rel=1e-3)


def test_a_second_pass_on_other_pictures(run: Run, teacher_dir: Path) -> None:
    teacher = Teacher(mllm(teacher_dir), shares_tower=False)
    taught = Contrasted(teacher).outside(BATCH, None)
    blank = replace(BATCH, student=replace(BATCH.student, pixels_ICHW=0 * BATCH.student.pixels_ICHW))
    expected_BTV = 2 * logits(teacher(BATCH)) - logits(teacher(blank))
    torch.testing.assert_close(logits(taught.prediction), expected_BTV)
    assert torch.equal(logits(taught.others["blank"]), logits(teacher(blank)))
    run.teaching = Contrasted
    assert run.fit() is None


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_temperatures_and_noise_of_each_row(run: Run, teacher_dir: Path, noise: float) -> None:
    teacher = Teacher(mllm(teacher_dir), shares_tower=False)
    said = logits(RowTemperatures(teacher, noise=noise).outside(BATCH, None).prediction)
    plain_BTV = logits(teacher(BATCH)) / temperatures(BATCH.student)[..., None]
    assert torch.allclose(said, plain_BTV, atol=1e-6) == (noise == 0.0)
    run.teaching = lambda teacher: RowTemperatures(teacher, noise=noise)
    assert run.fit() is None


# What the door promises ----


class Ordered(Teaching):
    """Remembers what was asked, and whether gradients were on."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher, self.asked = teacher, []

    def outside(self, batch, features_INE):
        self.asked.append(("outside", torch.is_grad_enabled(), features_INE is not None))
        return FromTeacher(self.teacher).outside(batch, features_INE)

    def inside(self, batch, student, features_INE, taught):
        self.asked.append(("inside", torch.is_grad_enabled(), student.hidden_BTD.requires_grad))
        return taught

    def losses(self, batch, student, taught, counts):
        self.asked.append(("losses", torch.is_grad_enabled(), taught.prediction is not None))

    def figures(self, batch, taught, counts):
        self.asked.append(("figures", torch.is_grad_enabled(), taught.prediction is not None))
        return {}


def test_each_question_is_asked_once_a_batch_in_its_order_and_with_its_gradient(run: Run) -> None:
    found: list[Ordered] = []

    def ordered(teacher: Teacher) -> Teaching:
        found.append(Ordered(teacher))
        return found[-1]

    run.teaching = ordered
    run.trainer(TinyLoader(sizes=(4,)), log_every=2).fit()
    asked = [("outside", False, True), ("inside", True, True), ("losses", True, True)]
    logged = [*asked, ("figures", False, True)]
    assert found[0].asked == [*asked, *logged, *asked, *logged, *logged]  # steps 2, 4 and the last are logged


def test_an_evaluation_asks_nothing(run: Run) -> None:
    class Refusing(Teaching):
        changes_pictures = True

        def pictures(self, batch: Batch) -> Batch:
            raise AssertionError("asked")

    run.teaching = lambda _: Refusing()
    run.trainer(TinyLoader())
    alone = among(run.objective, "cross_entropy")
    _, means = run.student(BATCH, BATCH.counts(), objective=alone)
    assert set(means) == {"cross_entropy"}


# Names instead of positions ----


def test_a_figure_that_comes_or_goes_is_named() -> None:
    sums = Sums(ALONE)
    one, two = torch.tensor(1.0), torch.tensor(2.0)
    assert sums({"b": one, "a": two}, "figures") == {"a": two, "b": one}
    with pytest.raises(
        ValueError, match="must report the same figures at every step, but a is missing, c is new"
    ):
        sums({"b": one, "c": one}, "figures")
    assert sums({"c": one}, "counts") == {"c": one}


@pytest.mark.parametrize("name", ["response_tokens", "records"])
def test_a_denominator_that_a_student_counts_is_the_one_of_all_micro_batches(
    run: Run, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = run.trainer(TinyLoader(sizes=(1, 3)))
    seen: list[Counts] = []
    counted = run.student.counts
    losses = run.student.losses

    def own(batch: Batch) -> Counts:
        records = torch.tensor(float(len(batch.record_ids)), dtype=torch.float64)
        return Counts(**counted(batch), records=records)

    def noting(call, batch, counts, **asked):
        seen.append(counts)
        return losses(call, batch, counts, **asked)

    monkeypatch.setattr(run.student, "counts", own)
    monkeypatch.setattr(run.student, "losses", noting)
    group = next(TinyLoader(sizes=(1, 3)).batches(0, 1))
    trainer.step(group, 0)
    expected = sum(float(own(batch)[name]) for batch in group)
    assert [float(counts[name]) for counts in seen] == [expected, expected]
