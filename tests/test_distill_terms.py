"""What a term says of itself holds: what it reads, what it is divided by, what it brings, how it is stored.

Shape legend: I images, N tokens of an image, M places, D and E width of student and teacher.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Annotated, ClassVar, Literal, get_args, get_origin, get_type_hints

import extra_terms
import pytest
import torch
from extra_terms import Mapped
from safetensors.torch import load_file
from tiny_batches import inputs, record
from tiny_objectives import furnished, objective_of
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from typing_extensions import Doc

from llava_kd.assembly import settings
from llava_kd.assembly.parts.stored_teacher import reads_projector
from llava_kd.batch import Batch, TeacherRows
from llava_kd.cli import main
from llava_kd.config import objective_type
from llava_kd.distill.formulas import REFERENCE, Common
from llava_kd.distill.head_terms import blocks, head_requests
from llava_kd.distill.objective import Objective, places_read
from llava_kd.distill.taught import Taught
from llava_kd.distill.teaching.cached import CachedTeacher
from llava_kd.distill.teaching.live import Teacher
from llava_kd.distill.terms import TERMS
from llava_kd.distill.terms.cross_entropy import CrossEntropy
from llava_kd.distill.terms.relation import Relation
from llava_kd.distill.terms.response_kl import ResponseKL
from llava_kd.distill.terms.seen import Seen
from llava_kd.distill.terms.term import IMAGES, VISUAL_TOKENS, Denominator, Reads, Term
from llava_kd.distill.terms.visual_kl import VisualKL
from llava_kd.losses.reference import HeadLoss
from llava_kd.models.files.checkpoint import load_stock
from llava_kd.models.mllm import MLLM, Prediction

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def student(student_dir: Path) -> MLLM:
    return MLLM(load_stock(str(student_dir)).stock, trainable=("multi_modal_projector", "language_model"))


@pytest.fixture(scope="module")
def teacher(teacher_dir: Path) -> Teacher:
    return Teacher(MLLM(load_stock(str(teacher_dir)).stock), shares_tower=False)


def predicted(student: MLLM, batch: Batch) -> Prediction:
    return student(batch.student, student.image_features(batch.student))


ONE_IMAGE = Batch(student=inputs(record(1)), record_ids=("a",))
MIXED = Batch(
    student=inputs(record(1), record(2, images=2), record(3, images=0), record(4, is_valid=False)),
    record_ids=("a", "b", "c", "d"),
)


# The table ----


@pytest.mark.parametrize("name", TERMS)
def test_a_term_says_what_it_is(name: str) -> None:
    kind = TERMS[name]
    hints = get_type_hints(kind, include_extras=True)
    for setting in fields(kind):
        hint = hints[setting.name]
        assert get_origin(hint) is Annotated, f"{name}.{setting.name} has neither range nor description"
        assert any(isinstance(extra, Doc) for extra in get_args(hint)[1:]), f"{name}.{setting.name}"
    assert kind.label
    assert kind.paper
    assert f"`{name}`" in (DOCS / "method.md").read_text()
    assert settings.labels()[name] == kind.label


@pytest.mark.parametrize("name", TERMS)
def test_a_term_is_set_by_its_name(name: str) -> None:
    config = objective_type(TERMS)(**{name: TERMS[name]()})  # pyright: ignore[reportArgumentType]
    assert list(config.terms) == [name]
    assert config.needs_teacher == (name not in ("cross_entropy", "label_smoothing", "mcmi"))


def test_a_term_may_not_take_the_name_of_another_setting() -> None:
    with pytest.raises(ValueError, match="a term may not be named"):
        objective_type({"losses": CrossEntropy})


# What a cache holds is what terms read ----


def choices(kind: type[Term]) -> list[Term]:
    hints = {f.name: get_type_hints(kind)[f.name] for f in fields(kind)}
    options = {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}
    options |= {name: (False, True) for name, hint in hints.items() if hint is bool}
    named = [dict(zip(options, chosen, strict=True)) for chosen in product(*options.values())]
    # Whose attention weighs is refused where nothing is weighed.
    return [kind(**one) for one in named if one.get("looked_at_by") != "questions" or one["weighed"]]


SERVED = [
    (name, term)
    for name, kind in TERMS.items()
    for term in choices(kind)
    if term.reads.teacher in ("logits", "states")
]


@pytest.mark.parametrize(("name", "term"), SERVED, ids=str)
def test_a_cache_of_what_terms_declare_gives_the_live_loss(
    student: MLLM, teacher: Teacher, name: str, term: Term
) -> None:
    """Everything else of the teacher is zero there, or is not there."""
    objective = objective_of(num_common=260, **{name: term})  # pyright: ignore[reportArgumentType]
    objective = furnished(objective, student, teacher.mllm)
    live = teacher(MIXED)
    where = {"response": MIXED.student.places.response_N, "visual": MIXED.student.places.visual_N}
    places_M = torch.cat([where[place] for place in places_read(objective.terms)])
    rows = TeacherRows(
        places_M=places_M,
        hidden_ME=live.hidden_BTD.flatten(0, 1)[places_M],
        projected_INE=live.projected_IND if reads_projector(objective.terms) else None,
    )
    stored = replace(MIXED, teacher_rows=rows)
    cached = CachedTeacher(live.head_VD, live.bias_V)(stored)
    own = predicted(student, MIXED)
    counts = objective.counts(MIXED)
    losses = [objective(own, Taught(prediction=p), MIXED, counts).loss for p in (live, cached)]
    by_listing = ("first", "label_listed", "choice_listed")
    is_never_right = isinstance(term, ResponseKL) and term.trust in by_listing  # a teacher of random weights
    assert float(losses[0].detach()) > 0 or is_never_right
    torch.testing.assert_close(losses[1], losses[0])


@dataclass(frozen=True, kw_only=True)
class Projected(Term):
    """1 - cosine of projected features, in the first numbers of both; `declares` it or not."""

    declares: bool = True
    label: ClassVar[str] = "projected features"
    denominator: ClassVar[Denominator] = VISUAL_TOKENS

    @property
    def reads(self) -> Reads:
        return Reads(teacher="states", grids=True, projector=self.declares)

    def total(self, seen: Seen) -> Tensor:
        student_IND, teacher_INE = seen.features("projector")
        rows_IN = 1 - cosine_similarity(student_IND, teacher_INE[..., : student_IND.shape[2]], dim=-1)
        return (rows_IN * seen.is_valid_I.unsqueeze(1)).sum()


def without_projector(live: Prediction) -> Prediction:
    """As a cache of hidden states that kept no projector output gives it, for a batch of one image."""
    places_M = ONE_IMAGE.student.places.response_N
    rows = TeacherRows(places_M=places_M, hidden_ME=live.hidden_BTD.flatten(0, 1)[places_M])
    cached = CachedTeacher(live.head_VD, live.bias_V)(replace(ONE_IMAGE, teacher_rows=rows))
    assert isinstance(cached, Prediction)
    assert cached.projected_IND.shape[:2] == (0, 1)  # which [1, N, E] would be broadcast to: a sum of nothing
    return cached


def test_a_projectors_output_that_is_not_there_is_no_loss_of_zero(student: MLLM, teacher: Teacher) -> None:
    live = teacher(ONE_IMAGE)
    own, counts = predicted(student, ONE_IMAGE), ONE_IMAGE.counts()
    good = objective_of(projected=Projected())(own, Taught(prediction=live), ONE_IMAGE, counts)
    assert float(good.loss.detach()) > 0
    for term in (Projected(), Relation(tap="projector")):
        with pytest.raises(ValueError, match="1 images and the prediction the projector's output of 0"):
            objective_of(term=term)(own, Taught(prediction=without_projector(live)), ONE_IMAGE, counts)
    with pytest.raises(ValueError, match="the term term reads what it does not declare: add projector=True"):
        objective_of(term=Projected(declares=False))(own, Taught(prediction=live), ONE_IMAGE, counts)


@pytest.mark.parametrize(
    ("reads", "ask", "missing"),
    [
        (Reads(), lambda s: s.rows("response"), "places="),
        (Reads(places=("visual",)), lambda s: s.rows("response"), "places="),
        (Reads(places=("response",)), lambda s: s.states("response"), "teacher='states'"),
        (Reads(teacher="logits"), lambda s: s.heads(), "teacher='states'"),
        (Reads(teacher="states"), lambda s: s.features("hidden"), "places="),
        (Reads(teacher="states", places=("visual",)), lambda s: s.features("logits"), "grids=True"),
        (Reads(teacher="states", grids=True), lambda s: s.attention_maps(), "attention"),
        (
            Reads(attention=(0.3, 0.7), teacher="states"),
            lambda s: s.attention_maps(),
            "teacher='model'",
        ),
        (
            Reads(teacher="model", places=("response",)),
            lambda s: s.switched_states("response"),
            "switch",
        ),
        (Reads(teacher="states"), lambda s: s.num_common, "vocabulary=True"),
    ],
)
def test_a_term_is_shown_what_it_declares_and_no_more(
    student: MLLM, teacher: Teacher, reads: Reads, ask, missing: str
) -> None:
    own, live = predicted(student, ONE_IMAGE), teacher(ONE_IMAGE)
    seen = Seen("mine", reads, ONE_IMAGE, Common(), student=own, teacher=live)
    with pytest.raises(ValueError, match=f"the term mine reads what it does not declare: add {missing}"):
        ask(seen)


# Denominators ----


def _records(batch: Batch) -> Tensor:
    return torch.tensor(float(len(batch.record_ids)), dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class PerRecord(Projected):
    denominator: ClassVar[Denominator] = Denominator(name="records", count=_records)


@dataclass(frozen=True, kw_only=True)
class OtherRecords(Projected):
    denominator: ClassVar[Denominator] = Denominator(name="records", count=lambda batch: _records(batch) * 2)


@dataclass(frozen=True, kw_only=True)
class Taken(Projected):
    denominator: ClassVar[Denominator] = Denominator(name="images", count=_records)


def test_a_term_may_bring_its_own_denominator(student: MLLM, teacher: Teacher) -> None:
    objective = objective_of(projected=Projected(), per_record=PerRecord(weight=2.0))
    counts = objective.counts(MIXED)
    assert set(counts) == {"response_tokens", "visual_tokens", "images", "records"}
    means = objective(predicted(student, MIXED), Taught(prediction=teacher(MIXED)), MIXED, counts).means
    ratio = float(counts["visual_tokens"]) / 4
    assert float(means["per_record"]) == pytest.approx(float(means["projected"]) * ratio, rel=1e-5)
    with pytest.raises(ValueError, match="the step counts no 'records'"):
        objective(predicted(student, MIXED), Taught(prediction=teacher(MIXED)), MIXED, MIXED.counts())


def test_one_name_is_one_count() -> None:
    with pytest.raises(ValueError, match="two terms count 'records' in two ways"):
        Objective(terms={"a": PerRecord(), "b": OtherRecords()})
    with pytest.raises(ValueError, match="counts 'images' by itself"):
        Objective(terms={"a": Taken()}).counts(ONE_IMAGE)


# The head ----

CE = CrossEntropy()


@pytest.mark.parametrize(
    ("terms", "calls"),
    [
        ({"cross_entropy": CE, "response_kl": ResponseKL(), "visual_kl": VisualKL()}, [2]),
        ({"cross_entropy": CE, "response_kl": ResponseKL(temperature=2.0), "visual_kl": VisualKL()}, [1, 1]),
        ({"response_kl": ResponseKL(divergence="jsd"), "visual_kl": VisualKL(divergence="reverse")}, [1, 1]),
        ({"response_kl": ResponseKL(divergence="jsd"), "visual_kl": VisualKL(mix=0.3)}, [1, 1]),
        ({"cross_entropy": CE, "visual_kl": VisualKL()}, [1, 1]),
        ({"cross_entropy": CE}, [1]),
        ({"relation": Relation()}, []),
    ],
)  # fmt: skip
def test_terms_of_equal_temperature_and_divergence_share_a_call(
    student: MLLM, teacher: Teacher, terms: dict[str, Term], calls: list[int]
) -> None:
    assert [len(listed) for listed in blocks(head_requests(terms)).values()] == calls
    made = []

    def counted(*arguments: Tensor, **named) -> HeadLoss:
        made.append(named)
        return REFERENCE.head_loss(*arguments, **named)

    common = Common(num_common=260, formulas=replace(REFERENCE, head_loss=counted))
    objective = Objective(terms=terms, common=common)
    objective(predicted(student, MIXED), Taught(prediction=teacher(MIXED)), MIXED, MIXED.counts())
    assert len(made) == len(calls)


@dataclass(frozen=True, kw_only=True)
class Careless(ResponseKL):
    @property
    def reads(self) -> Reads:
        return Reads(teacher="logits")


def test_a_request_for_rows_that_are_not_declared_is_refused() -> None:
    with pytest.raises(ValueError, match="the term careless asks for response rows"):
        Objective(terms={"careless": Careless()})


# Weights of a term's own ----


def state(run: Path, step: int) -> dict[str, Tensor]:
    folder = run / "checkpoints" / f"step-{step:08d}"
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def test_weights_that_a_term_brings_are_trained_saved_and_resumed(stage) -> None:
    words = [
        f"--plugins=[{extra_terms.__file__}]",
        "--objective.mapped={weight: 0.5}",
        "--checkpoint.every=1",
    ]
    whole, half = stage("whole", max_steps=3), stage("half", max_steps=3)
    assert main(["train", str(whole), *words]) == 0
    name = "parameter/terms.mapped.weight"
    first, last = (state(whole.with_suffix(""), step) for step in (2, 3))
    assert not torch.equal(first[name], last[name])
    assert {f"{kind}/terms.mapped.bias" for kind in ("parameter", "exp_avg", "exp_avg_sq")} <= last.keys()
    exported = load_file(whole.with_suffix("") / "model" / "model.safetensors")
    assert not any("mapped" in key for key in exported)

    assert main(["train", str(half), *words]) == 0
    output = half.with_suffix("")
    (output / "run.json").unlink()
    for file in (output / "checkpoints" / "step-00000003").iterdir():
        file.unlink()
    (output / "checkpoints" / "step-00000003").rmdir()
    assert main(["train", str(half), *words]) == 0
    again = state(output, 3)
    assert again.keys() == last.keys()
    assert all(torch.equal(again[key], last[key]) for key in last)


@dataclass(frozen=True, kw_only=True)
class MappedByImage(Mapped):
    denominator: ClassVar[Denominator] = IMAGES


@pytest.mark.parametrize("term", [Mapped(), MappedByImage()], ids=lambda term: term.denominator.name)
def test_a_batch_without_images_still_reaches_a_terms_own_weights(
    student: MLLM, teacher: Teacher, term: Term
) -> None:
    module = nn.Linear(student.lm_head.weight.shape[1], 48)
    objective = Objective(terms={"mapped": term}, modules={"mapped": module})
    batch = Batch(student=inputs(record(1, images=0)), record_ids=("a",))
    losses = objective(predicted(student, batch), Taught(prediction=teacher(batch)), batch, batch.counts())
    losses.loss.backward()
    assert float(losses.loss.detach()) == 0
    assert all(p.grad is not None and not bool(p.grad.any()) for p in module.parameters())
