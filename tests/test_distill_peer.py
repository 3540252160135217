"""A peer: each side's gradient is that of a stage in which the other is a frozen teacher.

Shape legend: N rows, V vocabulary, I images, T tokens of an image, D width.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial, reduce
from operator import add
from pathlib import Path

import pytest
import torch
from tiny_batches import inputs, record
from tiny_llava import make_tiny_llava
from tiny_objectives import furnished, objective_of
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate, kl_div

from llava_kd.batch import Batch
from llava_kd.distill.formulas import FORMULAS, Common
from llava_kd.distill.objective import Objective
from llava_kd.distill.row_choice import choose
from llava_kd.distill.rows import Rows
from llava_kd.distill.student import Student
from llava_kd.distill.taught import Taught, TopKPrediction
from llava_kd.distill.teaching.from_teacher import FromTeacher
from llava_kd.distill.teaching.live import Teacher
from llava_kd.distill.teaching.peer import PEER, Peer, exchanged
from llava_kd.distill.terms.cross_entropy import CrossEntropy
from llava_kd.distill.terms.inner.hint import VisualHint
from llava_kd.distill.terms.inner.regions import VisualRegions
from llava_kd.distill.terms.relation import Relation
from llava_kd.distill.terms.response_kl import ResponseKL
from llava_kd.distill.terms.term import Term, Trust
from llava_kd.distill.terms.visual_kl import VisualKL
from llava_kd.losses.inner.regions import taught, window_means
from llava_kd.models.files.checkpoint import load_stock
from llava_kd.models.mllm import MLLM, PARTS, Prediction
from llava_kd.models.towers.visual_grid import VisualGrid, resample

COMMON = 260
KINDS = [{"images": 2}, {"prompt": 7}, {"images": 0}, {"answer": 9}, {"is_valid": False}]
SMALL, LARGE = VisualGrid(rows=4, columns=4), VisualGrid(rows=5, columns=5)
LOW, DEEPER = ("multi_modal_projector",), ("language_model.layers.0",)
TERMS: dict[str, dict[str, Term]] = {
    "mutual": {"response_kl": ResponseKL(temperature=2.0), "visual_kl": VisualKL(), "relation": Relation()},
    "better": {"response_kl": ResponseKL(trust="better")},
    "worse": {"response_kl": ResponseKL(trust="worse")},
    "hfd": {"visual_hint": VisualHint(kind="cosine", map="always", student_taps=LOW, teacher_taps=DEEPER)},
    "entropy": {"visual_regions": VisualRegions(student_taps=LOW, teacher_taps=DEEPER)},
    "answer": {"visual_regions": VisualRegions(judged_by="answer", trust="worse")},
}


@pytest.fixture(scope="module")
def peer_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Other widths and another tower; once of the same grid, once of a finer one."""
    root = tmp_path_factory.mktemp("peers")
    made = {"same grid": 32, "finer grid": 40}
    return {
        name: make_tiny_llava(
            root / str(size), hidden=40, layers=3, tower_hidden=48, image_size=size, vocab_size=280, seed=5
        )
        for name, size in made.items()
    }


def mllm(directory: Path, *trainable: str) -> MLLM:
    return MLLM(load_stock(str(directory)).stock, trainable=trainable or PARTS[1:])


def batch_of(kinds: list[dict], grid: str, first: int = 0) -> Batch:
    """Records of these kinds for both sides."""
    names = tuple(f"r{first + i}" for i in range(len(kinds)))
    rows = [record(first + i, **kind) for i, kind in enumerate(kinds)]
    if grid == "same grid":
        return Batch(student=inputs(*rows), record_ids=names)
    finer = [record(first + i, tokens=25, **kind) for i, kind in enumerate(kinds)]
    for ours, theirs in zip(rows, finer, strict=True):
        assert torch.equal(ours.ids[ours.labels >= 0], theirs.ids[theirs.labels >= 0])
    sized = [replace(item, pixels_ICHW=larger(item.pixels_ICHW)) for item in finer]
    return Batch(student=inputs(*rows), teacher=inputs(*sized), record_ids=names)


def larger(pixels_ICHW: Tensor) -> Tensor:
    if not len(pixels_ICHW):
        return pixels_ICHW.new_zeros(0, 3, 40, 40)
    return interpolate(pixels_ICHW, size=(40, 40), mode="bilinear")


def objectives(
    terms: dict[str, Term], grid: str, student: MLLM, peer: MLLM, losses: str = "fast"
) -> tuple[Objective, Objective]:
    """The student's, and the peer's."""
    is_other = grid != "same grid"
    forth = partial(resample, source=LARGE, target=SMALL) if is_other else None
    back = partial(resample, source=SMALL, target=LARGE) if is_other else None
    every = {"cross_entropy": CrossEntropy(), **terms}
    turned = {name: term.mirrored() for name, term in every.items()}
    ours = objective_of(num_common=COMMON, align=forth, losses=losses, **every)
    theirs = objective_of(num_common=COMMON, align=back, losses=losses, **turned)
    found = furnished(ours, student, peer), furnished(theirs, peer, student, seed=1)
    taps = [term.reads for term in terms.values()]
    student.watch_taps([tap for read in taps for tap in read.student_taps])
    peer.watch_taps([tap for read in taps for tap in read.teacher_taps])
    return found


def step(module: Student, *batches: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Means and gradients of a step of these micro-batches."""
    module.zero_grad()
    counts = reduce(add, map(module.counts, batches))
    means: dict[str, Tensor] = {}
    for batch in batches:
        loss, of_batch = module.losses(module, batch, counts)
        loss.backward()
        means = {name: means.get(name, 0.0) + value for name, value in of_batch.items()}
    found = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    missed = [name for name, gradient in found.items() if gradient is None]
    assert not missed, f"no gradient reaches {missed}"
    return means, {name: g.clone() for name, g in found.items() if g is not None}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], rtol: float = 1e-4) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        error = (value - other[name]).norm() / value.norm().clamp_min(1e-4)
        assert float(error) < rtol, f"{name}: {float(error)}"


@pytest.mark.parametrize("trains_tower", [False, True], ids=["frozen tower", "trained tower"])
@pytest.mark.parametrize("grid", ["same grid", "finer grid"])
@pytest.mark.parametrize("case", TERMS)
def test_each_side_learns_as_from_the_other_frozen(
    student_dir: Path, peer_dirs: dict[str, Path], case: str, grid: str, trains_tower: bool
) -> None:
    parts, terms, there = (PARTS if trains_tower else PARTS[1:]), TERMS[case], peer_dirs[grid]
    batch = batch_of(KINDS, grid)
    student, peer = mllm(student_dir, *parts), mllm(there, *parts)
    ours, theirs = objectives(terms, grid, student, peer)
    means, gradients = step(Student(student, ours, Peer(peer, theirs)).train(), batch)

    def frozen(directory: Path, taps: list[str]) -> FromTeacher:
        teacher = mllm(directory)
        teacher.watch_taps(taps)
        return FromTeacher(Teacher(teacher, shares_tower=False))

    reads = [term.reads for term in terms.values()]
    student_taps = [tap for read in reads for tap in read.student_taps]
    peer_taps = [tap for read in reads for tap in read.teacher_taps]
    alone = Student(student, ours, frozen(there, peer_taps)).train()
    alone_means, alone_gradients = step(alone, batch)
    other = Student(peer, theirs, frozen(student_dir, student_taps)).train()
    other_means, other_gradients = step(other, exchanged(batch))
    for name in ("cross_entropy", *terms):
        assert float(means[name]) == pytest.approx(float(alone_means[name]), rel=1e-5)
        assert float(means[f"{PEER}{name}"]) == pytest.approx(float(other_means[name]), rel=1e-5)
    assert {name.split(".")[0] for name in gradients} <= {"mllm", "teaching", "terms"}
    assert_same(alone_gradients, {n: g for n, g in gradients.items() if not n.startswith("teaching.")})
    peers = {n.removeprefix("teaching."): g for n, g in gradients.items() if n.startswith("teaching.")}
    assert_same(other_gradients, peers)


def test_two_equal_students_teach_nothing_and_learn_the_labels(student_dir: Path) -> None:
    batch = batch_of(KINDS, "same grid")
    terms: dict[str, Term] = {"response_kl": ResponseKL(), "visual_kl": VisualKL()}
    student, peer = mllm(student_dir), mllm(student_dir)
    ours, theirs = objectives(terms, "same grid", student, peer)
    means, gradients = step(Student(student, ours, Peer(peer, theirs, shares_tower=True)), batch)
    for name in terms:
        assert abs(float(means[name])) < 1e-6
        assert abs(float(means[f"{PEER}{name}"])) < 1e-6
    labels, plain = step(Student(mllm(student_dir), objective_of(cross_entropy=CrossEntropy())), batch)
    assert float(labels["cross_entropy"]) == pytest.approx(float(means[f"{PEER}cross_entropy"]), rel=1e-6)
    for prefix in ("", "teaching."):
        own = {n.removeprefix(prefix): g for n, g in gradients.items() if n.startswith(f"{prefix}mllm.")}
        for name, gradient in plain.items():
            torch.testing.assert_close(own[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("case", TERMS)
def test_a_step_does_not_depend_on_its_split(
    student_dir: Path, peer_dirs: dict[str, Path], case: str
) -> None:
    grid = "finer grid"
    student, peer = mllm(student_dir), mllm(peer_dirs[grid])
    ours, theirs = objectives(TERMS[case], grid, student, peer)
    module = Student(student, ours, Peer(peer, theirs)).train()
    together = step(module, batch_of(KINDS, grid))
    apart = step(
        module, batch_of(KINDS[:2], grid), batch_of(KINDS[2:3], grid, 2), batch_of(KINDS[3:], grid, 3)
    )
    assert_same(*(found[1] for found in (together, apart)), rtol=1e-3)
    for name, value in together[0].items():
        assert float(apart[0][name]) == pytest.approx(float(value), rel=1e-4, abs=1e-6), name


def test_the_plain_formulas_say_what_the_fast_ones_do(student_dir: Path, peer_dirs: dict[str, Path]) -> None:
    terms = TERMS["better"] | TERMS["answer"]
    grid = "finer grid"
    batch, found = batch_of(KINDS, grid), []
    for losses in ("fast", "reference"):
        student, peer = mllm(student_dir), mllm(peer_dirs[grid])
        ours, theirs = objectives(terms, grid, student, peer, losses)
        found.append(step(Student(student, ours, Peer(peer, theirs)).train(), batch)[1])
    assert_same(*found)


# Which side teaches ----


@torch.no_grad()
def said(model: MLLM, batch: Batch) -> Tensor:
    """[N, V] log-probabilities at the response rows, over the common columns."""
    prediction = model(batch.student, model.image_features(batch.student))
    rows_ND = prediction.hidden_BTD.flatten(0, 1)[batch.student.places.response_N]
    return (rows_ND @ prediction.head_VD.T)[:, :COMMON].log_softmax(1)


@pytest.mark.parametrize("trust", ["better", "worse"])
def test_each_response_token_is_taught_by_the_side_that_knows_its_label_better(
    student_dir: Path, peer_dirs: dict[str, Path], trust: Trust
) -> None:
    """By hand, over all response tokens; reversed, the other side teaches."""
    batch = batch_of(KINDS, "same grid")
    student, peer = mllm(student_dir), mllm(peer_dirs["same grid"])
    ours, theirs = objectives({"response_kl": ResponseKL(trust=trust)}, "same grid", student, peer)
    means, _ = step(Student(student, ours, Peer(peer, theirs)), batch)
    a_NV, b_NV = said(student, batch), said(peer, batch)
    places = batch.student.places.response_N
    labels_N = batch.student.targets_BT.flatten()[places]
    by_student, by_peer, taught_by_peer = 0.0, 0.0, 0
    for a_V, b_V, label in zip(a_NV, b_NV, labels_N.tolist(), strict=True):
        peer_is_better = bool(-b_V[label] < -a_V[label])
        if peer_is_better == (trust == "better"):
            taught_by_peer += 1
            by_peer += float(kl_div(a_V, b_V.exp(), reduction="sum"))
        else:
            by_student += float(kl_div(b_V, a_V.exp(), reduction="sum"))
    assert 0 < taught_by_peer < len(places)
    assert float(means["response_kl"]) == pytest.approx(by_peer / len(places), rel=1e-4)
    assert float(means[f"{PEER}response_kl"]) == pytest.approx(by_student / len(places), rel=1e-4)


@torch.no_grad()
def test_at_equal_loss_neither_side_teaches(student_dir: Path) -> None:
    """The divergence of equal models is zero whoever teaches, so the factors themselves are looked at."""
    batch = batch_of(KINDS, "same grid")
    model = mllm(student_dir)
    alike = model(batch.student, model.image_features(batch.student))
    rows = Rows.select("response", batch, with_teacher=True)
    for trust in ("better", "worse"):
        request = ResponseKL(trust=trust).head_request()
        chosen = choose(rows, request, batch, (alike, alike), Common(num_common=COMMON))
        assert len(chosen.factor_N) > 0
        assert not chosen.factor_N.any()


@pytest.mark.parametrize("losses", ["fast", "reference"])
def test_losses_of_labels_tell_apart_what_probabilities_round_away(losses: str) -> None:
    hidden_ND = torch.tensor([[40.0], [60.0], [-200.0], [-300.0], [0.0]])
    head_VD = torch.tensor([[1.0], [0.0], [0.0]])
    found = FORMULAS[losses].label_rows(hidden_ND, head_VD, torch.tensor([0, 0, 0, 0, 2]), num_common=2)
    assert found.probability_N.tolist()[:4] == [1.0, 1.0, 0.0, 0.0]
    assert 0 <= float(found.nll_N[1]) <= float(found.nll_N[0])
    assert found.nll_N[2:].tolist() == pytest.approx([200 + 0.0, 300.0, float("inf")])
    assert float(found.probability_N[4]) == 0


def test_the_largest_logits_of_a_cache_can_be_trusted_where_they_are_better(
    student_dir: Path, peer_dirs: dict[str, Path]
) -> None:
    """All but the last of them kept, which says what the model itself does."""
    batch = batch_of(KINDS, "same grid")
    teacher = Teacher(mllm(peer_dirs["same grid"]), shares_tower=False)
    prediction = teacher(batch)
    logits_BTV = (prediction.hidden_BTD @ prediction.head_VD.T)[..., :COMMON]
    logits_BTK, columns_BTK = logits_BTV.sort(dim=-1, descending=True)
    whole = TopKPrediction(
        logits_BTK=logits_BTK[..., :-1], columns_BTK=columns_BTK[..., :-1], rest_BT=logits_BTK[..., -1]
    )
    objective = objective_of(response_kl=ResponseKL(trust="better"), num_common=COMMON, losses="fast")
    means = []
    for predict in (teacher, lambda batch, features_INE=None: whole):
        means.append(step(Student(mllm(student_dir), objective, FromTeacher(predict)), batch)[0])
    assert float(means[0]["response_kl"]) == pytest.approx(float(means[1]["response_kl"]), rel=1e-4)
    assert float(means[0]["response_kl"]) > 0


def test_windows_are_squares_of_the_grid_and_smaller_at_its_edge() -> None:
    grid_IT = torch.arange(9.0).repeat(2, 1) * torch.tensor([[1.0], [2.0]])
    found_IT = window_means(grid_IT, 2)
    corner, right, below, last = (0 + 1 + 3 + 4) / 4, (2 + 5) / 2, (6 + 7) / 2, 8.0
    row = [corner, corner, right, corner, corner, right, below, below, last]
    assert found_IT.tolist() == [row, [2 * value for value in row]]
    assert torch.equal(window_means(grid_IT, 1), grid_IT)
    assert window_means(grid_IT, 5)[0].tolist() == [4.0] * 9
    assert window_means(grid_IT[:0], 2).shape == (0, 9)
    with pytest.raises(ValueError, match="need a square grid; an image has 8 tokens"):
        window_means(grid_IT[:, :8], 2)
    one, two = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 1.0])
    assert taught(one, two).tolist() == [0, 0, 1]
    assert taught(one, two, reversed_=True).tolist() == [1, 0, 0]


@pytest.mark.parametrize("trust", ["better", "worse"])
@torch.no_grad()
def test_windows_are_taught_by_the_side_of_less_entropy(
    student_dir: Path, peer_dirs: dict[str, Path], trust: str
) -> None:
    """By hand: final states of two models of one width, 2 x 2 windows of 4 x 4 tokens."""
    batch = batch_of(KINDS, "same grid")
    student = mllm(student_dir)
    teacher = Teacher(_of_width(student_dir, peer_dirs), shares_tower=False)
    term = VisualRegions(trust="better" if trust == "better" else "worse", window=2)
    objective = furnished(
        objective_of(visual_regions=term, num_common=COMMON, losses="fast"), student, teacher.mllm
    )
    with torch.enable_grad():
        means, _ = step(Student(student, objective, FromTeacher(teacher)), batch)
    total, number, chosen = 0.0, 0, 0
    sides = [student(batch.student, student.image_features(batch.student)), teacher(batch)]
    states = [
        side.hidden_BTD.flatten(0, 1)[batch.student.places.visual_N].unflatten(0, (-1, 16)) for side in sides
    ]
    for image in batch.student.places.valid_images_N.tolist():
        a_TD, b_TD = (s[image] for s in states)
        entropies = []
        for states_TD, side in zip((a_TD, b_TD), sides, strict=True):
            log_TV = (states_TD @ side.head_VD.T)[:, :COMMON].log_softmax(1)
            entropies.append(-(log_TV.exp() * log_TV).sum(1))
        for row in (0, 2):
            for column in (0, 2):
                window = [4 * (row + r) + column + c for r in (0, 1) for c in (0, 1)]
                surer = float(entropies[1][window].mean()) < float(entropies[0][window].mean())
                number += 1
                if surer == (trust == "better"):
                    chosen += 1
                    total += float((1 - cosine_similarity(a_TD[window], b_TD[window], dim=1)).sum())
    assert 0 < chosen < number
    assert float(means["visual_regions"]) == pytest.approx(total / (4 * number), rel=1e-4)


def _of_width(student_dir: Path, peer_dirs: dict[str, Path]) -> MLLM:
    """Another model of the student's sizes."""
    return mllm(make_tiny_llava(peer_dirs["same grid"].parent / "like", hidden=32, tied=True, seed=11))


@torch.no_grad()
def test_each_picture_is_taught_by_the_side_that_answers_its_record_better(
    student_dir: Path, peer_dirs: dict[str, Path]
) -> None:
    """By hand, record by record; a record of text alone judges no picture."""
    student, teacher = mllm(student_dir), Teacher(_of_width(student_dir, peer_dirs), shares_tower=False)
    kinds = [{"images": 2}, {"images": 0}, *[{"answer": number} for number in (2, 3, 4, 5, 6)]]
    batch = batch_of(kinds, "same grid", first=20)
    term = VisualRegions(judged_by="answer")
    objective = furnished(
        objective_of(visual_regions=term, num_common=COMMON, losses="fast"), student, teacher.mllm
    )
    with torch.enable_grad():
        means, _ = step(Student(student, objective, FromTeacher(teacher)), batch)
    total, tokens, better = 0.0, 0, []
    for number, kind in enumerate(kinds):
        one = batch_of([kind], "same grid", first=20 + number)
        labels_N = one.student.targets_BT.flatten()[one.student.places.response_N]
        losses = [
            -float(said(m, one).gather(1, labels_N.unsqueeze(1)).mean()) for m in (student, teacher.mllm)
        ]
        if not one.student.num_images:
            continue
        better.append(losses[1] < losses[0])
        sides = [m(one.student, m.image_features(one.student)) for m in (student, teacher.mllm)]
        states = [side.hidden_BTD.flatten(0, 1)[one.student.places.visual_N] for side in sides]
        tokens += len(states[0])
        total += better[-1] * float((1 - cosine_similarity(*states, dim=1)).sum())
    assert set(better) == {True, False}
    assert float(means["visual_regions"]) == pytest.approx(total / tokens, rel=1e-4)


def test_what_a_peer_says_has_no_graph_for_the_student(student_dir: Path, peer_dirs: dict[str, Path]) -> None:
    batch = batch_of(KINDS, "same grid")
    student, peer = mllm(student_dir), mllm(peer_dirs["same grid"])
    student.watch_taps(["multi_modal_projector"])
    peer.watch_taps(["multi_modal_projector"])
    ours, theirs = objectives(TERMS["hfd"], "same grid", student, peer)
    del ours
    features_INE = student.image_features(batch.student)
    prediction = student(batch.student, features_INE)
    said = Peer(peer, theirs).inside(batch, prediction, features_INE, Taught())
    shown = said.prediction
    assert isinstance(shown, Prediction)
    held = [value for value in vars(shown).values() if isinstance(value, Tensor)] + [*shown.tapped.values()]
    assert len(held) == 4
    assert not any(value.requires_grad for value in held)
