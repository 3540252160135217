"""Terms of other methods: oracles, where their gradient goes, and no dependence on how a step is cut.

Shape legend: B rows, T tokens, I images, N tokens of an image, D student width, E teacher or tower width,
V vocabulary rows, X and Y words before and behind.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial, reduce
from operator import add
from pathlib import Path

import pytest
import torch
from tiny_batches import TinyRecord, inputs, record
from tiny_llava import make_tiny_llava
from tiny_objectives import among, changed, objective_of
from torch import Tensor

from llava_kd.batch import Batch
from llava_kd.distill.formulas import REFERENCE, Align
from llava_kd.distill.objective import Objective
from llava_kd.distill.student import Student
from llava_kd.distill.taught import Taught
from llava_kd.distill.teaching.from_teacher import FromTeacher
from llava_kd.distill.teaching.live import Teacher
from llava_kd.distill.teaching.switch import Switch
from llava_kd.distill.terms.attention import Attention
from llava_kd.distill.terms.cross_entropy import CrossEntropy
from llava_kd.distill.terms.response_dbild import ResponseDBiLD
from llava_kd.distill.terms.visual_switch import VisualSwitch
from llava_kd.losses import reference
from llava_kd.models.files.checkpoint import load_stock
from llava_kd.models.mllm import MLLM
from llava_kd.models.projectors.width_map import width_map
from llava_kd.models.towers.visual_grid import VisualGrid, resample

COMMON = 260
PROJECTOR, TOWER = ("multi_modal_projector", "language_model"), ("vision_tower", *("multi_modal_projector",))
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
ALL = objective_of(
    cross_entropy=CrossEntropy(),
    response_dbild=ResponseDBiLD(weight=0.7),
    visual_switch=VisualSwitch(weight=0.5, candidates=32),
    attention=Attention(weight=0.9),
    num_common=COMMON,
    losses="fast",
)
Result = tuple[dict[str, Tensor], dict[str, Tensor]]


def model(directory: Path, *, trainable: tuple[str, ...] = (), layers: range = range(1, 3)) -> MLLM:
    mllm = MLLM(load_stock(str(directory)).stock, trainable=trainable)
    mllm.watch_attention(layers)
    return mllm


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("lent")
    return {
        "student": make_tiny_llava(root / "student", hidden=32, layers=3, tied=True, seed=4),
        "teacher": make_tiny_llava(root / "teacher", hidden=48, layers=4, vocab_size=280),
    }


@pytest.fixture(scope="module")
def teacher(directories: dict[str, Path]) -> Teacher:
    return Teacher(model(directories["teacher"], layers=range(1, 4)), shares_tower=False)


@pytest.fixture(scope="module", params=["tower", "projector"])
def pair(request: pytest.FixtureRequest, directories: dict[str, Path], teacher: Teacher):
    """A student and the switch that fits what it trains."""
    trainable = ("vision_tower", *PROJECTOR) if request.param == "tower" else PROJECTOR
    student = model(directories["student"], trainable=trainable)
    map_DE = None
    if request.param == "projector":
        tables = [side.language_model.embed_tokens.weight for side in (student, teacher.mllm)]
        map_DE = width_map(tables[0][:COMMON], tables[1][:COMMON])
    return student, Switch(teacher=teacher.mllm, source=request.param, width_map_DE=map_DE)


def aligned(align: Align) -> Objective:
    return replace(ALL, common=replace(ALL.common, align=align))


def batch_of(*rows: TinyRecord | list[TinyRecord]) -> Batch:
    return Batch(student=inputs(*rows), record_ids=tuple(f"r{n}" for n in range(len(rows))))


def cut(sizes: list[int], *, packed: bool = False) -> list[Batch]:
    parts, start = [], 0
    for size in sizes:
        records = RECORDS[start : start + size]
        parts.append(batch_of(*([records] if packed else records)))
        start += size
    return parts


def run(
    batches: list[Batch], objective: Objective, student: MLLM, teacher: Teacher, switch: Switch | None
) -> Result:
    lent = switch if "visual_switch" in objective.terms else None
    module = Student(student, objective, FromTeacher(teacher, lent))
    module.zero_grad()
    counts = reduce(add, (batch.counts() for batch in batches))
    means: dict[str, Tensor] = {}
    for batch in batches:
        loss, partial_means = module(batch, counts, taught=Taught(prediction=teacher(batch)))
        loss.backward()
        for name, value in {"loss": loss.detach(), **partial_means}.items():
            means[name] = means.get(name, torch.zeros(())) + value
    return means, {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}


def assert_same(got: Result, expected: Result) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            error = (a[name] - b[name]).norm() / b[name].norm().clamp_min(1e-3)
            assert float(error) < 1e-4, f"{name}: {float(error)}"


# Splits ----


@pytest.mark.parametrize("sizes", [[1, 7], [4, 4], [1] * 8], ids=str)
def test_a_step_does_not_depend_on_the_split(pair, teacher: Teacher, sizes: list[int]) -> None:
    student, switch = pair
    whole = run(cut([8]), ALL, student, teacher, switch)
    assert {"response_dbild", "visual_switch", "attention"} < whole[0].keys()
    assert all(float(value) > 0 for value in whole[0].values())
    assert_same(run(cut(sizes), ALL, student, teacher, switch), whole)


@pytest.mark.parametrize("sizes", [[8], [3, 5]], ids=str)
def test_a_step_does_not_depend_on_packing(pair, teacher: Teacher, sizes: list[int]) -> None:
    student, switch = pair
    whole = run(cut([8]), ALL, student, teacher, switch)
    assert_same(run(cut(sizes, packed=True), ALL, student, teacher, switch), whole)


def test_the_reference_formulas_give_the_same_step(pair, teacher: Teacher) -> None:
    student, switch = pair
    plain = replace(ALL, common=replace(ALL.common, formulas=REFERENCE))
    fast = run(cut([3, 5]), ALL, student, teacher, switch)
    assert_same(fast, run(cut([3, 5]), plain, student, teacher, switch))


# Values ----


def stock_logits_TV(side: MLLM, item: TinyRecord, visual_IND: Tensor | None = None) -> Tensor:
    """Logits of one record from the stock parts; `visual_IND` stands in for the projector's output."""
    stock, batch = side.stock, inputs(item)
    embedded_BTD = stock.get_input_embeddings()(batch.input_ids_BT).clone()
    if batch.num_images:
        if visual_IND is None:
            visual_IND = stock.model.multi_modal_projector(side.image_features(batch))
        embedded_BTD[batch.visual_BT] = visual_IND.flatten(0, 1)
    return stock.lm_head(stock.model.language_model(inputs_embeds=embedded_BTD).last_hidden_state)[0]


@torch.no_grad()
def test_both_differences_of_logits_are_what_their_definitions_say(pair, teacher: Teacher) -> None:
    student, switch = pair
    means, _ = run_without_gradient(cut([8]), student, teacher, switch)
    rows: dict[str, list[Tensor]] = {"response_dbild": [], "visual_switch": []}
    form = partial(reference.dbild_rows, temperature=3.0)
    for item in RECORDS:
        batch, visual_IND = inputs(item), None
        if batch.num_images and switch.source == "tower":
            visual_IND = teacher.mllm.multi_modal_projector(student.image_features(batch))
        elif batch.num_images:
            features_INE = student.image_features(batch)
            visual_IND = student.multi_modal_projector(features_INE) @ switch.width_map_DE
        place = (item.labels >= 0).nonzero().squeeze(1) - 1
        t_NC = stock_logits_TV(teacher.mllm, item)[place, :COMMON]
        s_NC = stock_logits_TV(student, item)[place, :COMMON]
        x_NC = stock_logits_TV(teacher.mllm, item, visual_IND)[place, :COMMON]
        rows["response_dbild"].append(form(s_NC, t_NC, candidates=64))
        rows["visual_switch"].append(form(x_NC, t_NC, candidates=32))
    for name, values in rows.items():
        assert float(means[name]) == pytest.approx(float(torch.cat(values).mean()), rel=1e-3), name


def run_without_gradient(
    batches: list[Batch], student: MLLM, teacher: Teacher, switch: Switch
) -> tuple[dict[str, Tensor], Tensor]:
    module = Student(student, ALL, FromTeacher(teacher, switch))
    counts = reduce(add, (batch.counts() for batch in batches))
    loss, means = module(batches[0], counts, taught=Taught(prediction=teacher(batches[0])))
    return means, loss


def test_the_loss_is_the_weighted_sum(pair, teacher: Teacher) -> None:
    student, switch = pair
    means, _ = run(cut([8]), ALL, student, teacher, switch)
    weighted = means["cross_entropy"] + 0.7 * means["response_dbild"]
    weighted = weighted + 0.5 * means["visual_switch"] + 0.9 * means["attention"]
    assert float(means["loss"]) == pytest.approx(float(weighted), rel=1e-5)


def test_the_students_own_visual_output_in_its_own_path_costs_nothing(directories: dict[str, Path]) -> None:
    """A student that is the teacher: equal logits through the switch, equal attention, no gradient."""
    student = model(directories["teacher"], trainable=("vision_tower", *PROJECTOR))
    teacher = Teacher(model(directories["teacher"]), shares_tower=False)
    table = student.language_model.embed_tokens.weight
    identity = width_map(table, table)
    for source, map_DE, limit in (("tower", None, 0.0), ("projector", identity, 1e-5)):
        switch = Switch(teacher=teacher.mllm, source=source, width_map_DE=map_DE)
        means, gradients = run(cut([8]), changed(ALL, cross_entropy=None), student, teacher, switch)
        assert abs(float(means["visual_switch"])) <= limit
        assert abs(float(means["attention"])) < 1e-6
        assert all(bool((gradient.abs() < 1e-3).all()) for gradient in gradients.values())


# Where the gradient goes ----


def test_the_switch_moves_the_students_visual_side_alone_and_never_the_teacher(
    pair, teacher: Teacher
) -> None:
    student, switch = pair
    before = copy.deepcopy(teacher.mllm.stock.state_dict())
    _, gradients = run(
        cut([8]), objective_of(visual_switch=VisualSwitch(), num_common=COMMON), student, teacher, switch
    )
    moved = {name.split(".")[0] for name, gradient in gradients.items() if bool(gradient.any())}
    assert moved == ({"vision_tower"} if switch.source == "tower" else {"multi_modal_projector"})
    assert all(p.grad is None and not p.requires_grad for p in teacher.mllm.stock.parameters())
    assert not any(module.training for module in teacher.mllm.stock.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.mllm.stock.state_dict().items())


def test_the_teacher_is_no_part_of_the_students_tree(pair, teacher: Teacher) -> None:
    student, switch = pair
    module = Student(student, ALL, FromTeacher(teacher, switch)).train()
    assert {name.split(".")[0] for name, _ in module.named_modules() if name} == {"mllm"}
    assert not any(child.training for child in switch.teacher.stock.modules())


def test_attention_moves_layers_up_to_the_last_watched_one(directories, teacher: Teacher) -> None:
    student = model(directories["student"], trainable=PROJECTOR, layers=range(1, 2))
    _, gradients = run(cut([8]), objective_of(attention=Attention()), student, teacher, None)
    moved = {n for n, gradient in gradients.items() if bool(gradient.any())}
    assert "language_model.layers.1.self_attn.q_proj.weight" in moved
    assert "multi_modal_projector.linear_1.weight" in moved
    assert not any(name.startswith("language_model.layers.2.") for name in moved)
    assert not any("layers.1.self_attn.v_proj" in name for name in moved)


# Rows that must not count ----


def test_a_bad_record_adds_nothing(pair, teacher: Teacher) -> None:
    student, switch = pair
    good, bad = [record(1), record(2, images=2)], record(3, images=2, is_valid=False)
    with_bad = run([batch_of(good[0], bad, good[1])], ALL, student, teacher, switch)
    assert_same(with_bad, run([batch_of(*good)], ALL, student, teacher, switch))


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
@pytest.mark.parametrize("only", ["response_dbild", "visual_switch", "attention", None])
def test_a_batch_without_rows_is_finite_and_reaches_every_weight(
    pair, teacher: Teacher, records: list[TinyRecord], only: str | None
) -> None:
    student, switch = pair
    objective = ALL if only is None else among(ALL, only)
    means, gradients = run([batch_of(*records)], objective, student, teacher, switch)
    assert all(bool(torch.isfinite(value)) for value in means.values())
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    assert trained - gradients.keys() <= {n for n in trained if n.startswith("vision_tower.")}
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values())
    if not any(item.is_valid and bool((item.labels >= 0).any()) for item in records):
        assert float(means["loss"]) == 0


# Different sides ----


def test_visual_outputs_of_other_grids_are_carried_over(tmp_path: Path) -> None:
    """A student of 25 tokens an image against a teacher of 16: switch and attention go opposite ways."""
    student = model(make_tiny_llava(tmp_path / "s", image_size=40, layers=3), trainable=PROJECTOR)
    teacher = Teacher(model(make_tiny_llava(tmp_path / "t", layers=3, seed=3)), shares_tower=False)
    ours = [record(n, tokens=25, answer=4) for n in (1, 2)]
    ours = [replace(item, pixels_ICHW=torch.randn(1, 3, 40, 40)) for item in ours]
    theirs = [record(n, answer=4) for n in (1, 2)]
    batch = Batch(student=inputs(*ours), teacher=inputs(*theirs), record_ids=("a", "b"))
    large, small = VisualGrid(rows=5, columns=5), VisualGrid(rows=4, columns=4)
    tables = [side.language_model.embed_tokens.weight for side in (student, teacher.mllm)]
    switch = Switch(
        teacher=teacher.mllm,
        source="projector",
        align=partial(resample, source=large, target=small),
        width_map_DE=width_map(tables[0][:COMMON], tables[1][:COMMON]),
    )
    objective = aligned(partial(resample, source=small, target=large))
    means, gradients = run([batch], objective, student, teacher, switch)
    assert all(float(means[name]) > 0 for name in ("visual_switch", "attention", "response_dbild"))
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values())
    with pytest.raises(ValueError, match="must agree in all but the layers"):
        run([batch], ALL, student, teacher, switch)


def retold(item: TinyRecord, *, before: int = 0, behind: int = 0, end: int | None = None) -> TinyRecord:
    """The same images and answer in another template: more words around the question, another end token."""
    start = int((item.labels >= 0).nonzero()[0])

    def told(values: Tensor, words_X: Tensor, words_Y: Tensor) -> Tensor:
        return torch.cat([words_X.to(values), values[:start], words_Y.to(values), values[start:]])

    ids = told(item.ids, torch.arange(before), torch.arange(behind))
    labels = told(item.labels, torch.full((before,), -100), torch.full((behind,), -100))
    visual = told(item.visual, torch.zeros(before), torch.zeros(behind))
    if end is not None:
        ids[-1] = labels[-1] = end
    return replace(item, ids=ids, labels=labels, visual=visual)


@torch.no_grad()
def test_sides_of_other_templates_are_compared_answer_by_answer(pair, teacher: Teacher) -> None:
    student, switch = pair
    ours = [record(1), record(2, images=0, answer=9), record(3, images=2, answer=2), record(4, prompt=11)]
    theirs = [retold(item, before=3 + n, behind=7, end=250) for n, item in enumerate(ours)]
    batch = Batch(student=inputs(*ours), teacher=inputs(*theirs), record_ids=tuple("abcd"))
    means, _ = run_without_gradient([batch], student, teacher, switch)
    both = Batch(student=inputs(*theirs), record_ids=batch.record_ids)
    # The switch reads the teacher's side alone.
    alike, _ = run_without_gradient([both], student, teacher, switch)
    assert float(means["visual_switch"]) == pytest.approx(float(alike["visual_switch"]), rel=1e-5)
    # Differences of logits: every answer token but the end, which is another one on each side.
    rows, count = [], 0
    for mine, his in zip(ours, theirs, strict=True):
        logits_s, logits_t = (
            stock_logits_TV(side, item)[(item.labels >= 0).nonzero().squeeze(1) - 1][:-1, :COMMON]
            for side, item in ((student, mine), (teacher.mllm, his))
        )
        rows.append(reference.dbild_rows(logits_s, logits_t, temperature=3.0, candidates=64))
        count += int((mine.labels >= 0).sum())
    assert float(means["response_dbild"]) == pytest.approx(float(torch.cat(rows).sum() / count), rel=1e-3)
    # Attention between visual tokens sees no word behind them.
    told = [retold(item, behind=5) for item in ours]
    plain, _ = run_without_gradient([batch_of(*ours)], student, teacher, switch)
    other = replace(batch, teacher=inputs(*told))
    longer, _ = run_without_gradient([other], student, teacher, switch)
    assert float(longer["attention"]) == pytest.approx(float(plain["attention"]), rel=1e-5)
    assert float(means["attention"]) != pytest.approx(float(plain["attention"]), rel=1e-3)


@pytest.mark.parametrize("is_resampled", [False, True], ids=["equal grids", "other grids"])
def test_packing_sides_of_other_templates_changes_nothing(
    pair, teacher: Teacher, tmp_path: Path, is_resampled: bool
) -> None:
    """Records of unequal lengths on the two sides, each packed by its own."""
    student, switch = pair
    objective, tokens, size = ALL, 16, 32
    if is_resampled:
        trainable = ("vision_tower", *PROJECTOR) if switch.source == "tower" else PROJECTOR
        student = model(make_tiny_llava(tmp_path / "s", image_size=40, layers=3), trainable=trainable)
        large, small = VisualGrid(rows=5, columns=5), VisualGrid(rows=4, columns=4)
        tables = [side.language_model.embed_tokens.weight for side in (student, teacher.mllm)]
        switch = replace(
            switch,
            align=partial(resample, source=large, target=small),
            width_map_DE=width_map(tables[0][:COMMON], tables[1][:COMMON])
            if switch.source == "projector"
            else None,
        )
        objective, tokens, size = aligned(partial(resample, source=small, target=large)), 25, 40
    counts = ((1, 4, 5), (0, 4, 9), (2, 3, 2), (1, 11, 3), (3, 4, 1))
    shapes = [{"images": i, "prompt": p, "answer": a} for i, p, a in counts]
    ours = [record(n, tokens=tokens, **shape) for n, shape in enumerate(shapes)]
    ours = [replace(r, pixels_ICHW=torch.randn(len(r.pixels_ICHW), 3, size, size)) for r in ours]
    theirs = [retold(record(n, **shape), before=n, behind=6 - n, end=7) for n, shape in enumerate(shapes)]
    names = tuple("abcde")
    padded = Batch(student=inputs(*ours), teacher=inputs(*theirs), record_ids=names)
    packed = Batch(
        student=inputs(ours[:2], ours[2:]), teacher=inputs(theirs[:3], theirs[3:]), record_ids=names
    )
    whole = run([padded], objective, student, teacher, switch)
    assert all(float(whole[0][name]) > 0 for name in ("response_dbild", "visual_switch", "attention"))
    assert_same(run([packed], objective, student, teacher, switch), whole)


def test_predictions_that_are_missing_are_named(pair, teacher: Teacher, directories) -> None:
    student, _ = pair
    batch = batch_of(record(1))
    own = student(batch.student, student.image_features(batch.student))
    with pytest.raises(ValueError, match="no prediction over the student's visual output"):
        ALL(own, Taught(prediction=teacher(batch)), batch, batch.counts())
    blind = replace(own, attention_LINN=None)
    with pytest.raises(ValueError, match="whose attention is recorded"):
        objective_of(attention=Attention())(blind, Taught(prediction=teacher(batch)), batch, batch.counts())
    with pytest.raises(ValueError, match="got no teacher prediction"):
        objective_of(attention=Attention())(own, Taught(), batch, batch.counts())
