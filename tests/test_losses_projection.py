"""One vocabulary carried into the other, against the same sums written out in loops.

Shape legend: S stretches, V rows of a head, D width, E entries.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from test_losses_cross import KINDS, STUDENT, TEACHER, WORDS, masses, said
from torch import Tensor

from llava_kd.losses.cross.projection import Onto, Projection, projected_loss, projected_loss_by_chunk
from llava_kd.losses.cross.stretches import Distance, Stretched, StretchLoss, Words
from llava_kd.losses.divergence import Divergence, Kind
from llava_kd.losses.reference import head_loss

# By columns of the heads. Of the student 5 has no rule; of the teacher 2 is reached by nothing.
TO_TEACHER = {4: {3: 1.0}, 0: {5: 1.0}, 2: {0: 1.0}, 1: {3: 0.9, 4: 0.1}, 3: {4: 1.0}}
TO_STUDENT = {3: {4: 1.0}, 5: {0: 1.0}, 0: {2: 0.25, 4: 0.75}, 4: {4: 1.0}}  # 2 has none, 1, 3 and 5 get none
RULES: dict[Onto, dict[int, dict[int, float]]] = {"onto_teacher": TO_TEACHER, "onto_student": TO_STUDENT}
DISTANCES = [
    Distance(temperature=heat, divergence=Divergence(kind, 0.3))
    for kind, heat in itertools.product(KINDS, (1.0, 2.0))
]


def projection(onto: Onto, words: Words = WORDS) -> Projection:
    entries = [(a, b, w) for a, to in RULES[onto].items() for b, w in to.items()]
    sources, targets, shares = zip(*entries, strict=True)
    weight_E = torch.tensor(shares, dtype=torch.float64)
    return Projection(onto, words, torch.tensor(sources), torch.tensor(targets), weight_E)


def run(
    form: str, student: Stretched, teacher: Stretched, carried: Projection, distance: Distance
) -> StretchLoss:
    if form == "plain":
        return projected_loss(student, teacher, carried, distance)
    return projected_loss_by_chunk(student, teacher, carried, distance, chunk_rows=int(form))


def by_hand(onto: Onto, distance: Distance) -> list[tuple[float, float, float]]:
    """Of every stretch its distance, the teacher's share that is compared, and the ruled share."""
    mine = WORDS.student_K.tolist() + WORDS.student_A.tolist()
    theirs = WORDS.teacher_K.tolist() + WORDS.teacher_B.tolist()
    heat, b, rules = distance.temperature, distance.divergence.mix, RULES[onto]
    rows = []
    for s_D, t_D in zip(STUDENT.first_SD, TEACHER.first_SD, strict=True):
        p_s, p_t = said(STUDENT, s_D, mine, heat), said(TEACHER, t_D, theirs, heat)
        carried: dict[int, float] = {}
        for source, p in (p_s if onto == "onto_teacher" else p_t).items():
            for to, weight in rules.get(source, {}).items():
                carried[to] = carried.get(to, 0.0) + weight * p
        total = 0.0
        for to, mass in carried.items():
            s, t = (mass, p_t[to]) if onto == "onto_teacher" else (p_s[to], mass)
            m = b * t + (1 - b) * s
            total += {
                "forward": masses(t, s),
                "reverse": masses(s, t),
                "jsd": b * masses(t, m) + (1 - b) * masses(s, m),
            }[distance.divergence.kind]
        ruled = sum(carried.values())
        compared = ruled if onto == "onto_student" else sum(p_t[to] for to in carried)
        rows.append((heat**2 * total, compared, ruled))
    return rows


@pytest.mark.parametrize("form", ["plain", "1", "3", "8"])
@pytest.mark.parametrize("distance", DISTANCES, ids=str)
@pytest.mark.parametrize("onto", RULES)
def test_both_forms_are_the_sums_written_out(onto: Onto, distance: Distance, form: str) -> None:
    found = run(form, STUDENT, TEACHER, projection(onto), distance)
    rows, compared, ruled = torch.tensor(by_hand(onto, distance), dtype=torch.float64).T
    torch.testing.assert_close(found.rows_S, rows, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.loss, rows.sum(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.paired_S, compared)
    assert found.ruled_S is not None
    torch.testing.assert_close(found.ruled_S, ruled)
    assert bool((rows > 0).all())


@pytest.mark.parametrize("form", ["plain", "2"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("onto", RULES)
def test_the_gradient_is_that_of_finite_differences(onto: Onto, kind: Kind, form: str) -> None:
    """Of states, head and bias; of nothing of the teacher."""
    carried, distance = projection(onto), Distance(temperature=2.0, divergence=Divergence(kind, 0.3))
    teacher = TEACHER._replace(head_VD=TEACHER.head_VD.clone().requires_grad_())

    def loss(first_SD: Tensor, head_VD: Tensor, bias_V: Tensor) -> Tensor:
        moved = STUDENT._replace(first_SD=first_SD, head_VD=head_VD, bias_V=bias_V)
        return run(form, moved, teacher, carried, distance).loss

    assert STUDENT.bias_V is not None
    sources = (STUDENT.first_SD, STUDENT.head_VD, STUDENT.bias_V)
    assert torch.autograd.gradcheck(loss, tuple(x.clone().requires_grad_() for x in sources))
    assert teacher.head_VD.grad is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["plain", "4"])
@pytest.mark.parametrize("onto", RULES)
def test_onto_the_same_vocabulary_it_is_response_kl(onto: Onto, form: str, kind: Kind) -> None:
    """Tokens in another order there; fp32, logits so far apart that probabilities underflow."""
    drawn = torch.Generator().manual_seed(3)
    states_ND, teacher_NE = (20 * torch.randn(6, 8, generator=drawn) for _ in range(2))
    head_VD, head_UE = torch.randn(11, 8, generator=drawn), torch.randn(12, 8, generator=drawn)
    order_K, none = torch.randperm(10, generator=drawn), torch.zeros(0, dtype=torch.long)
    own_K = torch.arange(10)
    words = Words(student_K=own_K, teacher_K=order_K, student_A=none, teacher_B=none)
    ends = (own_K, order_K) if onto == "onto_teacher" else (order_K, own_K)
    carried = Projection(onto, words, *ends, torch.ones(10))
    found = []
    for is_cross in (True, False):
        moved = [states_ND.clone().requires_grad_(), head_VD.clone().requires_grad_()]
        if is_cross:
            tokens_N = torch.arange(6)
            student = Stretched(moved[0], tokens_N, moved[0][:0], none, none, moved[1])
            teacher = Stretched(teacher_NE, tokens_N, teacher_NE[:0], none, none, head_UE)
            distance = Distance(temperature=2.0, divergence=Divergence(kind, 0.3))
            loss = run(form, student, teacher, carried, distance).loss
        else:
            loss = head_loss(
                moved[0], moved[1], torch.zeros(6, dtype=torch.long), ce_weight_N=torch.zeros(6),
                teacher_NE=teacher_NE, teacher_head_UE=head_UE[order_K], kl_weight_N=torch.ones(6),
                temperature=2.0, divergence=Divergence(kind, 0.3), num_common=10,
            ).loss  # fmt: skip
        loss.backward()
        found.append([loss.detach(), *(x.grad for x in moved)])
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)  # of values up to some hundreds


def test_a_text_that_is_as_likely_on_both_sides_costs_nothing() -> None:
    """A student of whole numbers, a teacher of digits: the first piece takes all of what is carried."""
    p = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)  # of 11, 12, 21, 22
    one = torch.ones(1, 1, dtype=torch.float64)
    none = torch.zeros(0, dtype=torch.long)
    empty = {"first_tokens_S": none.new_zeros(1), "further_RD": one[:0], "tokens_R": none, "stretch_R": none}
    student = Stretched(first_SD=one, head_VD=p.log()[:, None], **empty)
    digits = torch.tensor([p[:2].sum(), p[2:].sum()], dtype=torch.float64)
    teacher = Stretched(first_SD=one, head_VD=digits.log()[:, None], **empty)
    words = Words(student_K=none, teacher_K=none, student_A=torch.arange(4), teacher_B=torch.arange(2))
    whole = Projection(
        "onto_teacher", words, torch.arange(4), torch.tensor([0, 0, 1, 1]), one.expand(4, 1)[:, 0]
    )
    assert abs(float(projected_loss(student, teacher, whole, Distance()).loss)) < 1e-12


@pytest.mark.parametrize("form", ["plain", "2"])
def test_nothing_to_compare_is_zero_with_a_gradient(form: str) -> None:
    head_VD = STUDENT.head_VD.clone().requires_grad_()
    student, teacher = (
        one._replace(first_SD=one.first_SD[:0], first_tokens_S=one.first_tokens_S[:0])
        for one in (STUDENT._replace(head_VD=head_VD), TEACHER)
    )
    found = run(form, student, teacher, projection("onto_teacher"), Distance())
    found.loss.backward()
    assert found.loss.item() == 0
    assert head_VD.grad is not None
    assert not bool(head_VD.grad.any())


def test_a_logit_that_is_no_number_stays_none() -> None:
    bad = STUDENT.first_SD.clone()
    bad[1] = math.inf
    for form in ("plain", "2"):
        found = run(form, STUDENT._replace(first_SD=bad), TEACHER, projection("onto_teacher"), Distance())
        assert found.rows_S.isnan().tolist() == [False, True, False, False, False]


def test_bad_input_is_named() -> None:
    one = torch.tensor([0])
    with pytest.raises(ValueError, match="from tokens of one side to tokens of the other"):
        Projection("onto_teacher", WORDS, torch.tensor([6]), one, torch.ones(1))  # the student's padding
    with pytest.raises(ValueError, match="for each of its entries, and an entry; got 1, 1 and 0"):
        Projection("onto_teacher", WORDS, one, one, torch.ones(0))
