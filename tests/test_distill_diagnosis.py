"""Figures that no loss gives: gradients per term, and what both models say of the same tokens.

Shape legend: B rows, T tokens, N rows, V vocabulary, D width of the student.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from extra_terms import Mapped
from test_training_trainer import OBJECTIVE
from tiny_batches import inputs, record
from tiny_objectives import among, changed
from torch import Tensor

from llava_kd.batch import Batch, Counts, Inputs
from llava_kd.distill.diagnosis import Diagnosis, measured
from llava_kd.distill.formulas import FAST, REFERENCE
from llava_kd.distill.learned_weights import LearnedWeights, learnable
from llava_kd.distill.objective import Objective
from llava_kd.distill.taught import Taught, TopKPrediction
from llava_kd.distill.terms.attention import Attention
from llava_kd.distill.terms.cross_entropy import CrossEntropy
from llava_kd.distill.terms.relation import Relation
from llava_kd.distill.terms.response_dbild import ResponseDBiLD
from llava_kd.distill.terms.seen import Seen
from llava_kd.distill.terms.term import Reads, Term
from llava_kd.distill.terms.visual_switch import VisualSwitch
from llava_kd.losses.row_figures import of_logits, row_figures
from llava_kd.models.mllm import Prediction

V, U, D, E = 280, 290, 12, 20
COMMON = 260
TOKENS = ("student_nll", "student_entropy", "teacher_nll", "teacher_entropy")


def prediction(inputs: Inputs, width: int, rows: int, seed: int, dtype=torch.float64) -> Prediction:
    generator = torch.Generator().manual_seed(seed)
    shape = (*inputs.input_ids_BT.shape, width)
    return Prediction(
        hidden_BTD=torch.randn(shape, generator=generator, dtype=dtype),
        projected_IND=torch.zeros(inputs.num_images, 1, width, dtype=dtype),
        head_VD=torch.randn(rows, width, generator=generator, dtype=dtype) / width**0.5,
        bias_V=torch.randn(rows, generator=generator, dtype=dtype),
    )


@dataclass
class Case:
    """A step of four records on one device, whole and cut into parts."""

    batch: Batch
    student: Prediction
    teacher: Prediction
    counts: Counts

    @staticmethod
    def of(dtype=torch.float64) -> Case:
        batch = Batch(student=inputs(*[record(i, answer=3 + i) for i in range(4)]), record_ids=tuple("abcd"))
        student = prediction(batch.student, D, V, 1, dtype)
        return Case(batch, student, prediction(batch.student, E, U, 2, dtype), batch.counts())

    def parts(self, *sizes: int) -> list[tuple[Prediction, Taught, Batch]]:
        """The same records in micro-batches of so many rows; what is predicted is cut with them."""
        found, start = [], 0
        for size in sizes:
            rows, start = slice(start, start + size), start + size
            records = [record(i, answer=3 + i) for i in range(4)][rows]
            length = self.batch.student.input_ids_BT.shape[1]
            batch = Batch(student=inputs(*records, pad_to=length), record_ids=("r",) * size)
            student, teacher = (
                replace(p, hidden_BTD=p.hidden_BTD[rows]) for p in (self.student, self.teacher)
            )
            found.append((student, Taught(prediction=teacher), batch))
        return found

    def figures(self, objective: Objective, *sizes: int) -> dict[str, float]:
        diagnosis = Diagnosis(objective)
        for student, taught, batch in self.parts(*(sizes or (4,))):
            diagnosis.look(student, taught, batch, self.counts)
        return {name: float(value) for name, value in diagnosis.figures(lambda values: values).items()}


FULL = changed(OBJECTIVE, response_dbild=ResponseDBiLD(candidates=8))


@pytest.fixture
def case() -> Case:
    return Case.of()


def oracle(case: Case, objective: Objective) -> dict[str, float]:
    """Autograd's own: a layer that does nothing stands before the head, and each loss runs back to it."""
    norms = {}
    for name, term in objective.terms.items():
        layer_DD = torch.eye(D, dtype=torch.float64, requires_grad=True)
        through = replace(case.student, hidden_BTD=case.student.hidden_BTD @ layer_DD.T)
        alone = replace(objective, terms={name: term}, common=replace(objective.common, formulas=REFERENCE))
        loss = alone(through, Taught(prediction=case.teacher), case.batch, case.counts).loss
        norms[name] = float(torch.autograd.grad(loss, layer_DD)[0].norm())
    return norms


@pytest.mark.parametrize("formulas", [FAST, REFERENCE], ids=["fast", "reference"])
def test_the_norms_are_autograds_of_a_layer_before_the_head(case: Case, formulas) -> None:
    objective = replace(FULL, common=replace(FULL.common, formulas=formulas))
    expected, got = oracle(case, objective), case.figures(objective)
    assert len(expected) == 5
    for name, norm in expected.items():
        assert got[f"gradient/{name}"] == pytest.approx(norm, rel=1e-9), name
        assert got[f"gradient_share/{name}"] == pytest.approx(norm / sum(expected.values()), rel=1e-9), name


def test_a_weight_scales_a_gradient_and_a_term_of_no_weight_has_none(case: Case) -> None:
    before = case.figures(FULL)
    after = case.figures(changed(FULL, relation=Relation(weight=5.0), cross_entropy=CrossEntropy(weight=0.0)))
    assert after["gradient/relation"] == pytest.approx(10 * before["gradient/relation"])
    assert after["gradient/response_kl"] == before["gradient/response_kl"]
    assert "gradient/cross_entropy" not in after


def test_a_learned_weight_scales_a_gradient_as_one_that_is_set(case: Case) -> None:
    names = learnable(FULL.terms)
    learned = LearnedWeights(names)
    with torch.no_grad():
        learned.free_K[names.index("relation")] = 0.7
    factors = learned.factors(learned())
    before, after = case.figures(FULL), case.figures(replace(FULL, learned=learned))
    assert float(factors["relation"]) != pytest.approx(1, abs=0.1)
    for name in names:
        expected = before[f"gradient/{name}"] * float(factors[name])
        assert after[f"gradient/{name}"] == pytest.approx(expected, rel=1e-5)
    assert after["gradient/cross_entropy"] == before["gradient/cross_entropy"]


@pytest.mark.parametrize("sizes", [(2, 2), (1, 3), (1, 1, 1, 1)], ids=str)
def test_no_figure_depends_on_how_the_step_is_cut(case: Case, sizes: tuple[int, ...]) -> None:
    assert case.figures(FULL, *sizes) == pytest.approx(case.figures(FULL), rel=1e-9)


def test_tokens_that_pull_apart_cancel(case: Case) -> None:
    """As in any weight, and unlike a sum over tokens of squares."""

    @dataclass(frozen=True, kw_only=True)
    class Apart(Term):
        sign: float = 1.0

        @property
        def reads(self) -> Reads:
            return Reads(places=("response",))

        def total(self, seen: Seen) -> Tensor:
            rows_N = seen.rows("response").student_N
            states_ND = case.student.hidden_BTD.flatten(0, 1)
            states_ND[rows_N[1]] = states_ND[rows_N[0]]
            first, second = seen._student.hidden_BTD.flatten(0, 1)[rows_N[:2]]
            return first.sum() + self.sign * second.sum()

    together, apart = (
        case.figures(replace(FULL, terms={"apart": Apart(sign=sign)}))["gradient/apart"]
        for sign in (1.0, -1.0)
    )
    assert together > 1e-3
    assert apart == pytest.approx(0, abs=1e-12)


def test_what_does_not_go_through_the_final_states_alone_is_not_measured() -> None:
    terms = {
        "cross_entropy": CrossEntropy(),
        "relation": Relation(tap="hidden"),
        "early": Relation(tap="projector"),
        "attention": Attention(),
        "visual_switch": VisualSwitch(),
        "mapped": Mapped(),
        "off": CrossEntropy(weight=0.0),
    }
    assert measured(terms) == ["cross_entropy", "relation", "mapped"]


def test_the_tokens_are_those_of_whole_softmaxes(case: Case) -> None:
    """By enumeration, a row at a time, from logits of every token and column."""
    got = case.figures(OBJECTIVE)
    targets_N = case.batch.student.targets_BT.flatten()
    rows = (targets_N != -100).nonzero().flatten().tolist()
    sums = dict.fromkeys((*TOKENS, "teacher_better", "top1_agreement"), 0.0)
    for row in rows:
        choices, losses = [], []
        for whose, side in (("student", case.student), ("teacher", case.teacher)):
            logits_V = side.hidden_BTD.flatten(0, 1)[row] @ side.head_VD.T + side.bias_V
            logits = logits_V.tolist()
            losses.append(math.log(sum(map(math.exp, logits))) - logits[int(targets_N[row])])
            common = torch.tensor(logits[:COMMON]).double()
            probabilities = torch.softmax(common, 0)
            sums[f"{whose}_nll"] += losses[-1]
            sums[f"{whose}_entropy"] -= sum(float(p * p.log()) for p in probabilities)
            choices.append(int(common.argmax()))
        sums["teacher_better"] += losses[1] < losses[0]
        sums["top1_agreement"] += choices[0] == choices[1]
    for name, value in sums.items():
        assert got[f"tokens/{name}"] == pytest.approx(value / len(rows), rel=1e-5), name


def test_a_model_beside_itself_agrees_everywhere_and_is_nowhere_better(case: Case) -> None:
    case.teacher = case.student
    got = case.figures(OBJECTIVE)
    assert got["tokens/top1_agreement"] == 1
    assert got["tokens/teacher_better"] == 0
    assert got["tokens/teacher_nll"] == got["tokens/student_nll"]
    assert got["gradient/response_kl"] == pytest.approx(0, abs=1e-12)


def test_only_tokens_that_both_sides_answer_alike_are_compared(case: Case) -> None:
    labels_BT = case.batch.student.labels_BT.clone()
    labels_BT[0][labels_BT[0] != -100] = 7  # the teacher answers the first record otherwise
    theirs = replace(case.batch.student, labels_BT=labels_BT, known_places=None)
    diagnosis = Diagnosis(OBJECTIVE)
    two = replace(case.batch, teacher=theirs)
    diagnosis.look(case.student, Taught(prediction=case.teacher), two, case.counts)
    got = diagnosis.figures(lambda values: values)
    diagnosis = Diagnosis(OBJECTIVE)
    (_, three) = case.parts(1, 3)
    diagnosis.look(*three, case.counts)
    alone = diagnosis.figures(lambda values: values)
    names = [name for name in alone if name.startswith("tokens/")]
    assert len(names) == 6
    for name in names:
        assert float(got[name]) == pytest.approx(float(alone[name]), rel=1e-9), name


def test_the_largest_logits_give_what_they_give_exactly(case: Case) -> None:
    live = case.figures(OBJECTIVE)
    logits_BTU = case.teacher.hidden_BTD @ case.teacher.head_VD.T + case.teacher.bias_V
    top = logits_BTU[..., :COMMON].topk(4, sorted=False)
    rest_BT = logits_BTU[..., :COMMON].logsumexp(-1)
    stored = TopKPrediction(logits_BTK=top.values, columns_BTK=top.indices.int(), rest_BT=rest_BT)
    objective = among(OBJECTIVE, "cross_entropy", "response_kl")
    diagnosis = Diagnosis(objective)
    diagnosis.look(case.student, Taught(prediction=stored), case.batch, case.counts)
    got = {name: float(value) for name, value in diagnosis.figures(lambda values: values).items()}
    for name in ("top1_agreement", "student_nll", "student_entropy"):
        assert got[f"tokens/{name}"] == live[f"tokens/{name}"]
    assert not any("teacher" in name for name in got)


def test_without_a_teacher_the_student_is_described_alone(case: Case) -> None:
    diagnosis = Diagnosis(among(OBJECTIVE, "cross_entropy"))
    diagnosis.look(case.student, Taught(), case.batch, case.counts)
    got = diagnosis.figures(lambda values: values)
    assert {n for n in got if n.startswith("tokens/")} == {"tokens/student_nll", "tokens/student_entropy"}
    assert float(got["gradient_share/cross_entropy"]) == 1


def test_a_batch_without_a_target_or_a_picture_adds_nothing(case: Case) -> None:
    empty = Batch(student=inputs(record(9, images=0, is_valid=False)), record_ids=("none",))
    student, teacher = prediction(empty.student, D, V, 3), prediction(empty.student, E, U, 4)
    diagnosis = Diagnosis(FULL)
    diagnosis.look(student, Taught(prediction=teacher), empty, case.counts)
    assert all(float(value) == 0 for value in diagnosis.figures(lambda values: values).values())
    diagnosis.look(case.student, Taught(prediction=case.teacher), case.batch, case.counts)
    got = {name: float(value) for name, value in diagnosis.figures(lambda values: values).items()}
    assert got == pytest.approx(case.figures(FULL), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rows_in_chunks_are_rows_at_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden_ND, head_VD = (torch.randn(n, D, generator=generator).to(dtype) for n in (13, V))
    bias_V = torch.randn(V, generator=generator).to(dtype)
    targets_N = torch.randint(V, (13,), generator=generator)
    wide = torch.promote_types(dtype, torch.float32)
    whole = of_logits(hidden_ND.to(wide) @ head_VD.to(wide).T + bias_V.to(wide), targets_N, COMMON)
    for chunk_rows in (None, 1, 4, 13, 100):
        found = row_figures(hidden_ND, head_VD, bias_V, targets_N, num_common=COMMON, chunk_rows=chunk_rows)
        for expected, got in zip(whole, found, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_target_that_is_no_token_is_not_a_number_and_a_certain_row_has_no_doubt() -> None:
    logits_NV = torch.full((3, V), -torch.inf)
    logits_NV[:, 5] = 2.0
    found = of_logits(logits_NV, torch.tensor([5, V, -1]))
    assert found.nll_N.isnan().tolist() == [False, True, True]
    assert float(found.nll_N[0]) == 0
    assert found.entropy_N.tolist() == [0, 0, 0]
    assert found.choice_N.tolist() == [5, 5, 5]
