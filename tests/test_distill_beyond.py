"""Options beyond the paper: each against its definition written out, and no dependence on how a step is cut.

Shape legend: B rows, T tokens, H heads, L layers, I images, P response tokens, N tokens of an image, M stored
places, K kept columns or learned weights, V vocabulary rows, D width.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache, partial, reduce
from operator import add
from pathlib import Path

import pytest
import torch
from tiny_batches import TOKENS, TinyRecord, inputs, record
from tiny_llava import make_tiny_llava
from tiny_objectives import among, changed, objective_of
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import LlavaForConditionalGeneration

from llava_kd.batch import Batch, TeacherRows
from llava_kd.distill.formulas import REFERENCE
from llava_kd.distill.learned_weights import LearnedWeights, learnable
from llava_kd.distill.objective import Objective
from llava_kd.distill.student import Student
from llava_kd.distill.taught import AnyPrediction, Taught
from llava_kd.distill.teaching.cached import CachedTeacher
from llava_kd.distill.teaching.live import Teacher
from llava_kd.distill.terms.cross_entropy import CrossEntropy
from llava_kd.distill.terms.relation import Relation
from llava_kd.distill.terms.response_kl import ResponseKL
from llava_kd.distill.terms.term import Reads, Trust
from llava_kd.distill.terms.text_relation import TextRelation
from llava_kd.distill.terms.visual_kl import VisualKL
from llava_kd.losses.text_relation import text_relation_rows
from llava_kd.losses.uncertainty import GRADIENT_SCALE
from llava_kd.models.attention.answers import AnswerAttention
from llava_kd.models.files.checkpoint import load_stock
from llava_kd.models.mllm import MLLM, Prediction
from llava_kd.models.towers.visual_grid import VisualGrid, resample

COMMON = 260
TRAINABLE = ("multi_modal_projector", "language_model")
SHARE, KEPT = 0.3, 5  # of 16
LAYERS = range(1, 3)
ALL = objective_of(
    cross_entropy=CrossEntropy(),
    response_kl=ResponseKL(weight=0.8, trust="probability"),
    visual_kl=VisualKL(weight=0.7, share=SHARE),
    relation=Relation(normalise_rows=True),
    text_relation=TextRelation(weight=0.6, centre=True, normalise_rows=True),
    num_common=COMMON,
    losses="fast",
)
FIRST = changed(ALL, response_kl=ResponseKL(weight=0.8, trust="first", temperature=2.0))
SHAPES = [
    {},
    {"images": 0, "answer": 9},
    {"images": 2, "answer": 1},
    {"prompt": 11, "answer": 2},
    {"is_valid": False},
    {"images": 0, "answer": 0},
    {"images": 3, "answer": 7},
    {"answer": 0},
    {"answer": 3},
]
Result = tuple[dict[str, Tensor], dict[str, Tensor]]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("beyond")
    return {
        "student": make_tiny_llava(root / "student", hidden=32, layers=2, tied=True, seed=4),
        "teacher": make_tiny_llava(root / "teacher", hidden=48, layers=3, vocab_size=280),
    }


@pytest.fixture(scope="module")
def student(directories: dict[str, Path]) -> MLLM:
    return MLLM(load_stock(str(directories["student"])).stock, trainable=TRAINABLE)


@pytest.fixture(scope="module")
def teacher(directories: dict[str, Path]) -> Teacher:
    mllm = MLLM(load_stock(str(directories["teacher"])).stock)
    mllm.watch_answers(LAYERS)
    return Teacher(mllm, shares_tower=False)


@pytest.fixture(scope="module")
def records(teacher: Teacher) -> list[TinyRecord]:
    """Every second token of an answer is what the teacher would say there."""
    made = [record(seed, **shape) for seed, shape in enumerate(SHAPES, start=1)]
    for item in made:
        for place in (item.labels >= 0).nonzero().squeeze(1)[::2].tolist():
            said_V = logits_TV(teacher.mllm, item)[place - 1]
            item.ids[place] = item.labels[place] = said_V[:256].argmax()
            if int(said_V[:COMMON].argmax()) >= 256:
                item.ids[place] = item.labels[place] = said_V[:COMMON].argmax()
    return made


@torch.no_grad()
def stock_states_TD(side: MLLM, item: TinyRecord) -> Tensor:
    batch, stock = inputs(item), side.stock
    embedded_BTD = stock.get_input_embeddings()(batch.input_ids_BT).clone()
    if batch.num_images:
        visual_IND = stock.model.multi_modal_projector(side.image_features(batch))
        embedded_BTD[batch.visual_BT] = visual_IND.flatten(0, 1)
    return stock.model.language_model(inputs_embeds=embedded_BTD).last_hidden_state[0]


def logits_TV(side: MLLM, item: TinyRecord) -> Tensor:
    return side.stock.lm_head(stock_states_TD(side, item)).detach()


@lru_cache(maxsize=1)
def eager(directory: Path) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(directory, attn_implementation="eager")


def eager_attention_TT(directory: Path, item: TinyRecord) -> Tensor:
    """Of one record alone: a mean over the watched layers and the heads."""
    batch = inputs(item)
    with torch.no_grad():
        found = eager(directory)(
            input_ids=batch.input_ids_BT, pixel_values=batch.pixels_ICHW, output_attentions=True
        ).attentions
    return torch.stack([found[layer][0].mean(0) for layer in LAYERS]).mean(0)


def attended(directory: Path, item: TinyRecord, by: str = "answers") -> list[Tensor]:
    """For each image of a record: what the places that predict its answer, or its other text, attend to."""
    if not len(item.pixels_ICHW):
        return []
    maps_TT = eager_attention_TT(directory, item)
    places = range(len(item.ids))
    rows = [place - 1 for place in places if item.labels[place] >= 0]
    if by == "questions":
        rows = [place for place in places if item.labels[place] < 0 and not bool(item.visual[place])]
    return [maps_TT[rows][:, place_N].sum(0) for place_N in item.visual.nonzero().squeeze(1).split(TOKENS)]


def cut(records: list[TinyRecord], sizes: list[int], *, packed: bool = False) -> list[Batch]:
    parts, start = [], 0
    for size in sizes:
        chosen = records[start : start + size]
        names = tuple(str(start + i) for i in range(size))
        parts.append(Batch(student=inputs(*([chosen] if packed else chosen)), record_ids=names))
        start += size
    return parts


def run(batches: list[Batch], objective: Objective, student: MLLM, teacher: Teacher) -> Result:
    module = Student(student, objective)
    module.zero_grad()
    counts = reduce(add, map(objective.counts, batches))
    means: dict[str, Tensor] = {}
    for batch in batches:
        taught = Taught(prediction=teacher(batch) if objective.needs_teacher else None)
        loss, of_batch = module(batch, counts, taught=taught)
        loss.backward()
        for name, value in {"loss": loss.detach(), **of_batch}.items():
            means[name] = means.get(name, torch.zeros(())) + value
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return means, found


def assert_same(got: Result, expected: Result) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            error = (a[name] - b[name]).norm() / b[name].norm().clamp_min(1e-3)
            assert float(error) < 1e-4, f"{name}: {float(error)}"


def with_learned(objective: Objective, *, free: tuple[float, ...] | None = None, **options) -> Objective:
    learned = LearnedWeights(learnable(objective.terms), **options)
    if free is not None:
        learned.free_K.data = torch.tensor(free)
    return replace(objective, learned=learned)


# How a step is cut ----


@pytest.mark.parametrize("trust", ["probability", "first", "learned"])
@pytest.mark.parametrize(
    ("sizes", "packed"), [([1] * 9, False), ([4, 5], False), ([2, 7], True), ([9], True)]
)
def test_a_step_depends_on_neither_split_nor_packing(
    student: MLLM, teacher: Teacher, records: list[TinyRecord], sizes: list[int], packed: bool, trust: str
) -> None:
    objective = FIRST if trust == "first" else ALL
    if trust == "learned":
        objective = with_learned(ALL, free=(0.3, -0.5, 1.0, 0.2))
    whole = run(cut(records, [9]), objective, student, teacher)
    assert all(float(whole[0][name]) > 0 for name in objective.terms)
    assert_same(run(cut(records, sizes, packed=packed), objective, student, teacher), whole)


@pytest.mark.parametrize("objective", [ALL, FIRST], ids=["probability", "first"])
def test_the_reference_formulas_give_the_same_step(student, teacher, records, objective: Objective) -> None:
    plain = replace(objective, common=replace(objective.common, formulas=REFERENCE))
    batches = cut(records, [4, 5])
    assert_same(run(batches, objective, student, teacher), run(batches, plain, student, teacher))


# Which answers are of an image ----


@pytest.mark.parametrize("packed", [False, True])
def test_the_answers_of_an_image_are_those_of_its_record(records: list[TinyRecord], packed: bool) -> None:
    side = inputs(*([records[:5], records[5:]] if packed else records), pad_to=300)
    index_IP, is_there_IP = side.answers_of_images()
    image, before = 0, 0
    for item in records:
        count = int((item.labels >= 0).sum())
        for _ in item.pixels_ICHW:
            assert index_IP[image][is_there_IP[image]].tolist() == list(range(before, before + count))
            image += 1
        before += count
    assert image == len(index_IP)
    assert index_IP.shape[1] <= before


def test_no_image_and_no_answer_have_none() -> None:
    assert inputs(record(1, images=0)).answers_of_images()[0].shape == (0, 0)
    assert inputs(record(1, answer=0)).answers_of_images()[0].shape == (1, 0)


# What the teacher looks at ----


@pytest.mark.parametrize("packed", [False, True])
def test_it_is_what_eager_attention_gives(
    teacher: Teacher, records: list[TinyRecord], directories: dict[str, Path], packed: bool
) -> None:
    (batch,) = cut(records, [9], packed=packed)
    got_IN = teacher(batch).attended_IN
    expected = [row_N for item in records for row_N in attended(directories["teacher"], item)]
    assert got_IN is not None
    torch.testing.assert_close(got_IN, torch.stack(expected), rtol=1e-4, atol=1e-6)
    plain = Teacher(MLLM(load_stock(str(directories["teacher"])).stock), shares_tower=False)(batch)
    assert torch.equal(teacher(batch).hidden_BTD, plain.hidden_BTD)
    assert plain.attended_IN is None


@pytest.fixture(scope="module")
def asked(directories: dict[str, Path]) -> Teacher:
    """A teacher whose questions are watched."""
    mllm = MLLM(load_stock(str(directories["teacher"])).stock)
    mllm.watch_answers(LAYERS, by="questions")
    return Teacher(mllm, shares_tower=False)


@pytest.mark.parametrize("packed", [False, True])
def test_what_questions_look_at_is_what_eager_attention_gives(
    asked: Teacher, records: list[TinyRecord], directories: dict[str, Path], packed: bool
) -> None:
    """Rows of padding behind the records, and a record without an answer, which has a question."""
    rows = [records[:5], records[5:]] if packed else records
    batch = Batch(student=inputs(*rows, pad_to=200), record_ids=tuple("abcdefghi"[: len(rows)]))
    expected = [row_N for item in records for row_N in attended(directories["teacher"], item, "questions")]
    found_IN = asked(batch).attended_IN
    assert found_IN is not None
    torch.testing.assert_close(found_IN, torch.stack(expected), rtol=1e-4, atol=1e-6)
    nothing = asked(Batch(student=inputs(record(1, images=0)), record_ids=("a",))).attended_IN
    assert nothing is not None
    assert len(nothing) == 0


def by_the_questions(share: float) -> Objective:
    term = VisualKL(weighed=True, share=share, looked_at_by="questions")
    return objective_of(visual_kl=term, num_common=COMMON)


@pytest.mark.parametrize("share", [1.0, SHARE])
def test_weighed_visual_kl_is_the_sum_by_what_the_questions_look_at(
    student: MLLM, asked: Teacher, records: list[TinyRecord], directories: dict[str, Path], share: float
) -> None:
    total, number = 0.0, 0
    for item in records:
        if not item.is_valid or not len(item.pixels_ICHW):
            continue
        log_s_TV, p_t_TV = (logits_TV(side, item)[:, :COMMON] for side in (student, asked.mllm))
        scores = attended(directories["teacher"], item, "questions")
        for place_N, score_N in zip(item.visual.nonzero().squeeze(1).split(TOKENS), scores, strict=True):
            order = score_N.argsort(descending=True, stable=True)[: TOKENS if share == 1 else KEPT].tolist()
            for n in order:
                place = int(place_N[n])
                value = kl_div(log_s_TV[place].log_softmax(0), p_t_TV[place].softmax(0), reduction="sum")
                total += float(value) * TOKENS * float(score_N[n] / score_N[order].sum())
            number += TOKENS
    objective = by_the_questions(share)
    whole = run(cut(records, [9]), objective, student, asked)
    assert float(whole[0]["visual_kl"]) == pytest.approx(total / number, rel=1e-4)
    plain = objective_of(visual_kl=VisualKL(), num_common=COMMON)
    assert float(run(cut(records, [9]), plain, student, asked)[0]["visual_kl"]) != pytest.approx(
        total / number, rel=1e-3
    )
    for sizes, packed in (([4, 5], False), ([2, 7], True)):
        assert_same(run(cut(records, sizes, packed=packed), objective, student, asked), whole)


def test_an_image_that_no_text_attends_to_weighs_its_tokens_alike(
    student: MLLM, asked: Teacher, records: list[TinyRecord]
) -> None:
    class Unseen(Teacher):
        def __call__(self, batch: Batch, student_features_INE: Tensor | None = None) -> Prediction:
            said = super().__call__(batch, student_features_INE)
            assert said.attended_IN is not None
            return replace(said, attended_IN=0 * said.attended_IN)

    unseen = Unseen(asked.mllm, shares_tower=False)
    plain = objective_of(visual_kl=VisualKL(), num_common=COMMON)
    batches = cut(records, [4, 5])
    assert_same(run(batches, by_the_questions(1.0), student, unseen), run(batches, plain, student, asked))


def test_many_answers_are_looked_at_a_part_at_a_time(
    teacher: Teacher, records: list[TinyRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    (batch,) = cut(records, [9])
    whole_IN = teacher(batch).attended_IN
    monkeypatch.setattr("llava_kd.models.attention.answers._PLACES_AT_A_TIME", 2)
    torch.testing.assert_close(teacher(batch).attended_IN, whole_IN)


def test_layers_that_show_nothing_are_named(records: list[TinyRecord]) -> None:
    with pytest.raises(ValueError, match=r"visual_kl.share` needs .* its layers \[4\] report none"):
        AnswerAttention([4], inputs(records[0])).take()


def test_visual_kl_is_the_mean_over_the_tokens_that_are_looked_at_most(
    student: MLLM, teacher: Teacher, records: list[TinyRecord], directories: dict[str, Path]
) -> None:
    rows, others = [], []
    for item in records:
        if not item.is_valid:
            continue
        places = item.visual.nonzero().squeeze(1).split(TOKENS) if len(item.pixels_ICHW) else ()
        log_s_TV, p_t_TV = (logits_TV(side, item)[:, :COMMON] for side in (student, teacher.mllm))
        for place_N, score_N in zip(places, attended(directories["teacher"], item), strict=True):
            order = sorted(range(TOKENS), key=lambda n, s=score_N: (-float(s[n]), n))
            for rank, n in enumerate(order):
                place = int(place_N[n])
                value = kl_div(log_s_TV[place].log_softmax(0), p_t_TV[place].softmax(0), reduction="sum")
                (rows if rank < KEPT else others).append(float(value))
    means, gradients = run(cut(records, [4, 5]), among(ALL, "visual_kl"), student, teacher)
    expected = sum(rows) / len(rows)
    assert len(rows) == 9 * KEPT
    assert float(means["visual_kl"]) == pytest.approx(expected, rel=1e-4)
    assert float(means["loss"]) == pytest.approx(0.7 * expected, rel=1e-4)
    assert sum(others) / len(others) != pytest.approx(expected, rel=1e-3)
    # Those that are looked at and those that are not add up to the whole term, in gradient too.
    whole = run(cut(records, [9]), objective_of(visual_kl=VisualKL(), num_common=COMMON), student, teacher)
    mean = (sum(rows) + sum(others)) / (len(rows) + len(others))
    assert float(whole[0]["visual_kl"]) == pytest.approx(mean, rel=1e-4)
    assert any(not torch.allclose(g, whole[1][name], rtol=1e-2) for name, g in gradients.items())


def test_the_share_of_all_tokens_is_the_plain_term(student: MLLM, teacher: Teacher, records) -> None:
    plain = among(ALL, "visual_kl")
    plain = replace(plain, terms={"visual_kl": VisualKL(weight=0.7)})
    nearly = replace(plain, terms={"visual_kl": VisualKL(weight=0.7, share=0.999)})  # 16 of 16
    batches = cut(records, [4, 5])
    assert_same(run(batches, nearly, student, teacher), run(batches, plain, student, teacher))


def test_what_is_looked_at_is_carried_to_another_grid(teacher: Teacher, tmp_path: Path) -> None:
    """25 tokens of the student against 16: the scores and the states of the teacher go the same way."""
    student = MLLM(load_stock(str(make_tiny_llava(tmp_path / "s", image_size=40))).stock, trainable=TRAINABLE)
    ours = [replace(record(n, tokens=25), pixels_ICHW=torch.randn(1, 3, 40, 40)) for n in (1, 2)]
    theirs = [record(n) for n in (1, 2)]
    batch = Batch(student=inputs(*ours), teacher=inputs(*theirs), record_ids=("a", "b"))
    align = partial(resample, source=VisualGrid(rows=4, columns=4), target=VisualGrid(rows=5, columns=5))
    term = VisualKL(share=0.2)
    means, _ = run([batch], objective_of(visual_kl=term, align=align, num_common=COMMON), student, teacher)
    prediction, own = teacher(batch), student(batch.student, student.image_features(batch.student))
    assert prediction.attended_IN is not None
    score_IN = align(prediction.attended_IN.unsqueeze(2)).squeeze(2)
    visual_TD = prediction.hidden_BTD.flatten(0, 1)[batch.teacher_inputs.places.visual_N]
    states_IND = align(visual_TD.view(2, 16, -1))
    own_IND = own.hidden_BTD.flatten(0, 1)[batch.student.places.visual_N].view(2, 25, -1)
    rows = []
    for i in range(2):
        for n in score_IN[i].topk(5).indices.tolist():
            log_s = (own_IND[i, n] @ own.head_VD.T)[:COMMON].log_softmax(0)
            p_t = (states_IND[i, n] @ prediction.head_VD.T)[:COMMON].softmax(0)
            rows.append(float(kl_div(log_s, p_t, reduction="sum").detach()))
    assert float(means["visual_kl"]) == pytest.approx(sum(rows) / 10, rel=1e-4)


def test_a_teacher_that_shows_nothing_is_named(student: MLLM, teacher: Teacher, records) -> None:
    (batch,) = cut(records[:1], [1])
    own = student(batch.student, student.image_features(batch.student))
    blind = replace(teacher(batch), attended_IN=None)
    with pytest.raises(
        ValueError, match=r"a share of the visual tokens, or weights, .* whose attention is recorded"
    ):
        among(ALL, "visual_kl")(own, Taught(prediction=blind), batch, batch.counts())
    with pytest.raises(
        ValueError, match="what the teacher attends to is not stored: declare teacher='model'"
    ):
        Reads(teacher="states", attended=(0.3, 0.7, "answers"))
    with pytest.raises(ValueError, match=r"visual_kl.first` \(0.7\) must be less than `last` \(0.3\)"):
        VisualKL(first=0.7, last=0.3)
    with pytest.raises(ValueError, match=r"visual_kl.looked_at_by` questions says whose .* neither is set"):
        VisualKL(looked_at_by="questions")
    assert VisualKL(looked_at_by="questions", share=0.5).reads.attended == (0.3, 0.7, "questions")


# Text to vision ----


def test_the_relation_of_text_to_vision_is_of_each_image_and_its_answers(student, teacher, records) -> None:
    rows = []
    for item in records:
        states = [stock_states_TD(side, item) for side in (student, teacher.mllm)]
        answers = [place - 1 for place in range(len(item.ids)) if item.labels[place] >= 0]
        images = item.visual.nonzero().squeeze(1).split(TOKENS) if len(item.pixels_ICHW) else ()
        for place_N in images if item.is_valid else ():
            pairs = [(s[answers].unsqueeze(0), s[place_N].unsqueeze(0)) for s in states]
            there = torch.ones(1, len(answers), dtype=torch.bool)
            rows.append(text_relation_rows(pairs[0], pairs[1], there, centre=True, normalise_rows=True))
    means, _ = run(cut(records, [2, 7]), among(ALL, "text_relation"), student, teacher)
    assert float(means["text_relation"]) == pytest.approx(float(torch.cat(rows).mean()), rel=1e-4)


# Trust in the teacher ----


@pytest.mark.parametrize("trust", ["first", "probability", "label_listed", "choice_listed"])
def test_the_teacher_counts_where_it_is_right_and_all_targets_divide(
    student: MLLM, teacher: Teacher, records: list[TinyRecord], trust: Trust
) -> None:
    total, right, count, kept = 0.0, 0, 0, 0.0
    listed = 100 if trust == "choice_listed" else 3  # the student says what it likes
    for item in records:
        s_TV, t_TV = (logits_TV(side, item)[:, :COMMON] for side in (student, teacher.mllm))
        for place in range(1, len(item.ids)):
            if item.labels[place] < 0:
                continue
            count += 1
            p_t = t_TV[place - 1].softmax(0)
            label = int(item.labels[place])
            factor = float(p_t[label])
            if trust == "first":
                factor = float(all(float(p_t[label]) >= float(p) for p in p_t))
            if trust in ("label_listed", "choice_listed"):
                word = label if trust == "label_listed" else int(s_TV[place - 1].argmax())
                factor = float(word in p_t.topk(listed).indices.tolist())
            kept += factor
            right += int(p_t.argmax()) == label
            log_s, soft_t = (s_TV[place - 1] / 2).log_softmax(0), (t_TV[place - 1] / 2).softmax(0)
            total += factor * 4 * float(kl_div(log_s, soft_t, reduction="sum"))
    assert count / 2 <= right < count
    assert 0 < kept < count
    trusting = ResponseKL(weight=0.5, temperature=2.0, trust=trust, listed=listed)
    objective = objective_of(response_kl=trusting, num_common=COMMON, losses="fast")
    means, _ = run(cut(records, [5, 4]), objective, student, teacher)
    assert float(means["response_kl"]) == pytest.approx(total / count, rel=1e-4)
    assert float(means["loss"]) == pytest.approx(0.5 * total / count, rel=1e-4)


def test_tokens_that_are_not_trusted_have_no_gradient_and_others_all_of_theirs(student, teacher, records):
    """Where every token of a step is right, the term is the plain one; where none is, it is nothing."""
    item = record(3, answer=4)
    for place in (item.labels >= 0).nonzero().squeeze(1).tolist():
        item.ids[place] = item.labels[place] = logits_TV(teacher.mllm, item)[place - 1, :COMMON].argmax()
    trusting = objective_of(response_kl=ResponseKL(trust="first"), num_common=COMMON, losses="fast")
    plain = objective_of(response_kl=ResponseKL(), num_common=COMMON, losses="fast")
    right = cut([item], [1])
    assert_same(run(right, trusting, student, teacher), run(right, plain, student, teacher))
    wrong = record(4, answer=1)
    said = int(logits_TV(teacher.mllm, wrong)[-2, :COMMON].argmax())
    wrong.ids[-1] = wrong.labels[-1] = (said + 1) % 256
    means, gradients = run(cut([wrong], [1]), trusting, student, teacher)
    assert float(means["response_kl"]) == 0
    assert not any(bool(gradient.any()) for gradient in gradients.values())


def test_tokens_that_the_sides_answer_otherwise_are_neither_related_nor_trusted(student, teacher) -> None:
    """The teacher's template ends in another token."""
    ours, theirs = ([record(1), record(2, images=2, answer=3)] for _ in range(2))
    for item in theirs:
        item.ids[-1] = item.labels[-1] = (item.ids[-1] + 1) % 256
    batch = Batch(student=inputs(*ours), teacher=inputs(*theirs), record_ids=("a", "b"))
    related, trusted, count = [], 0.0, 0
    for mine, his in zip(ours, theirs, strict=True):
        answers = [place - 1 for place in range(len(mine.ids)) if mine.labels[place] >= 0]
        count += len(answers)
        pair = ((student, mine), (teacher.mllm, his))
        states = [stock_states_TD(side, item) for side, item in pair]
        for place_N in mine.visual.nonzero().squeeze(1).split(TOKENS):
            sides = [(s[answers[:-1]].unsqueeze(0), s[place_N].unsqueeze(0)) for s in states]
            there = torch.ones(1, len(answers) - 1, dtype=torch.bool)
            related.append(text_relation_rows(sides[0], sides[1], there, centre=True, normalise_rows=True))
        s_TV, t_TV = (logits_TV(side, item)[:, :COMMON] for side, item in pair)
        for place in answers[:-1]:
            p_t = t_TV[place].softmax(0)
            kl = kl_div(s_TV[place].log_softmax(0), p_t, reduction="sum")
            trusted += float(p_t[mine.ids[place + 1]] * kl)
    means, _ = run([batch], among(ALL, "response_kl", "text_relation"), student, teacher)
    assert float(means["text_relation"]) == pytest.approx(float(torch.cat(related).mean()), rel=1e-4)
    assert float(means["response_kl"]) == pytest.approx(trusted / count, rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("trust", ["first", "probability"])
def test_a_cache_of_the_largest_logits_is_exact_where_it_holds_the_labels(
    student: MLLM, teacher: Teacher, records: list[TinyRecord], trust: Trust
) -> None:
    """All columns but one are kept: the divergence, and what is said of the labels, is the live one."""
    (batch,) = cut(records, [9])
    live = teacher(batch)
    places_M = batch.student.places.response_N
    logits_MV = (live.hidden_BTD.flatten(0, 1)[places_M] @ live.head_VD.T)[:, :COMMON]
    top = logits_MV.topk(COMMON - 1, dim=1)
    rest_M = logits_MV.scatter(1, top.indices, -torch.inf).logsumexp(1)
    rows = TeacherRows(
        places_M=places_M, top_logits_MK=top.values, top_columns_MK=top.indices.int(), rest_M=rest_M
    )
    cached: AnyPrediction = CachedTeacher(live.head_VD, None)(replace(batch, teacher_rows=rows))
    own = student(batch.student, student.image_features(batch.student))
    for losses in ("fast", "reference"):
        objective = objective_of(
            response_kl=ResponseKL(trust=trust),
            cross_entropy=CrossEntropy(),
            num_common=COMMON,
            losses=losses,
        )
        found = [
            objective(own, Taught(prediction=said), batch, batch.counts()).means for said in (live, cached)
        ]
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


# Learned weights ----


def test_at_the_start_learned_weights_are_the_fixed_ones_bit_for_bit(student, teacher, records) -> None:
    batches = cut(records, [4, 5])
    fixed, learned = (run(batches, o, student, teacher) for o in (ALL, with_learned(ALL)))
    for name, value in fixed[0].items():
        assert torch.equal(learned[0][name], value), name
    for name, value in fixed[1].items():
        assert torch.equal(learned[1][name], value), name
    assert learned[1].keys() - fixed[1].keys() == {"learned_weights.free_K"}
    logged = {name: float(v) for name, v in learned[0].items() if name.startswith("weight/")}
    weights = {"response_kl": 0.8, "visual_kl": 0.7, "relation": 0.5, "text_relation": 0.6}
    assert logged == pytest.approx({f"weight/{name}": value for name, value in weights.items()})


def test_loss_and_gradients_are_those_of_the_formula(student, teacher, records) -> None:
    """Of sum w exp(-s) L + c s over the terms of the teacher, with cross-entropy as it is."""
    free, strength, most = (0.4, -0.8, 1.5, -2.0), 0.6, 20.0
    objective = with_learned(ALL, free=free, strength=strength, most=most)
    assert objective.learned is not None
    assert objective.learned.names == ("response_kl", "visual_kl", "relation", "text_relation")
    means, gradients = run(cut(records, [3, 6]), objective, student, teacher)
    limit = math.log(most)
    expected_loss, expected = 0.0, {}
    batches = cut(records, [9])
    slopes = []
    for name, term in ALL.terms.items():
        factor = term.weight
        if name in objective.learned.names:
            p = free[objective.learned.names.index(name)]
            s = limit * math.tanh(p / limit)
            factor *= math.exp(-s)
            slopes.append(
                GRADIENT_SCALE * (strength - factor * float(means[name])) * (1 - math.tanh(p / limit) ** 2)
            )
            expected_loss += strength * s
            assert float(means[f"weight/{name}"]) == pytest.approx(factor, rel=1e-5)
        alone = run(batches, replace(ALL, terms={name: replace(term, weight=1.0)}), student, teacher)
        assert float(means[name]) == pytest.approx(float(alone[0]["loss"]), rel=1e-4)
        expected_loss += factor * float(alone[0]["loss"])
        for key, gradient in alone[1].items():
            expected[key] = expected.get(key, 0) + factor * gradient
    assert float(means["loss"]) == pytest.approx(expected_loss, rel=1e-5)
    own = gradients.pop("learned_weights.free_K")
    torch.testing.assert_close(own, torch.tensor(slopes), rtol=1e-4, atol=1e-8)
    assert_same((means, gradients), (means, expected))


def test_a_step_without_rows_of_a_term_moves_its_weight_nowhere(student, teacher) -> None:
    objective = with_learned(ALL, free=(0.1, 0.2, 0.3, 0.4))
    _, gradients = run(cut([record(1, images=0)], [1]), objective, student, teacher)
    own = gradients["learned_weights.free_K"]
    assert float(own[0]) != 0
    assert own[1:].tolist() == [0, 0, 0]
    _, gradients = run(cut([record(1, images=0, answer=0)], [1]), objective, student, teacher)
    assert gradients["learned_weights.free_K"].tolist() == [0, 0, 0, 0]


def test_terms_settle_at_the_strength_and_within_their_bounds() -> None:
    """Means that do not move: exp(-s) w L comes to c, or the weight to its bound."""
    means = {"response_kl": torch.tensor(0.02), "visual_kl": torch.tensor(4.0), "relation": torch.tensor(0.0)}
    terms = {"response_kl": ResponseKL(weight=0.5), "visual_kl": VisualKL(), "relation": Relation()}
    learned = LearnedWeights(tuple(terms), strength=0.3, most=50.0)
    counts = Batch(student=inputs(record(1)), record_ids=("a",)).counts()
    steps = torch.optim.AdamW(learned.parameters(), lr=0.05, weight_decay=0.0)
    figures: dict[str, Tensor] = {}
    for _ in range(400):
        steps.zero_grad()
        loss, figures = learned.loss(learned(), terms, means, counts, counts)
        loss.backward()
        steps.step()
    for name in ("response_kl", "visual_kl"):
        assert float(figures[f"weight/{name}"] * means[name]) == pytest.approx(0.3, rel=0.05)
    assert 40 < float(figures["weight/relation"]) / 0.5 < 50.01
