"""Stretches of answers that two tokenizers cut otherwise, against the same sums written out in loops.

Shape legend: S stretches, R further tokens, V and U rows of the heads, D and E widths.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llava_kd.losses.cross.standing import Standing
from llava_kd.losses.cross.stretches import (
    Distance,
    Stretched,
    StretchLoss,
    Words,
    stretch_loss,
    stretch_loss_by_chunk,
)
from llava_kd.losses.divergence import Divergence, Kind
from llava_kd.losses.reference import head_loss

# Of 7 columns and 6: the student's last is padding, and so is the teacher's second.
WORDS = Words(
    student_K=torch.tensor([4, 0, 2]),
    teacher_K=torch.tensor([3, 5, 0]),
    student_A=torch.tensor([1, 3, 5]),
    teacher_B=torch.tensor([2, 4]),
)
MINE, THEIRS = (side_W.tolist() for side_W in WORDS.sides)
KINDS: tuple[Kind, ...] = ("forward", "reverse", "jsd")
DISTANCES = [
    Distance(temperature=heat, divergence=Divergence(kind, 0.3), unpaired=0.7)
    for kind, heat in itertools.product(KINDS, (1.0, 2.0))
]


def side(seed: int, rows: int, width: int, firsts: list[int], stretches: list[int]) -> Stretched:
    """fp64; `firsts`: what stands first in each stretch; `stretches`: of each further token its own."""
    drawn = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=drawn, dtype=torch.float64)

    chosen = torch.randint(len(firsts), (len(stretches),), generator=drawn)
    return Stretched(
        first_SD=randn(len(firsts), width),
        first_tokens_S=torch.tensor(firsts),
        further_RD=randn(len(stretches), width),
        tokens_R=torch.tensor(firsts)[chosen],
        stretch_R=torch.tensor(stretches, dtype=torch.long),
        head_VD=randn(rows, width),
        bias_V=randn(rows),
    )


# What stands first is a pair already, of two pairs, of none and one, of one and none, of none (at one place).
STUDENT = side(0, 7, 5, [4, 4, 3, 2, 1], [1, 1, 2, 4])
TEACHER = side(1, 6, 3, [3, 5, 0, 4, 2], [2, 3, 3, 3])


def said(one: Stretched, state_D: Tensor, columns: list[int], heat: float) -> dict[int, float]:
    """Probabilities of a row by column."""
    bias_V = one.bias_V if one.bias_V is not None else torch.zeros(len(one.head_VD))
    z = {v: float(one.head_VD[v] @ state_D + bias_V[v]) / heat for v in columns}
    whole = sum(math.exp(value) for value in z.values())
    return {v: math.exp(value) / whole for v, value in z.items()}


def merged(one: Stretched, columns: list[int], heat: float) -> list[dict[int, float]]:
    found = []
    for number, state_D in enumerate(one.first_SD):
        c = 1.0
        for state, token, of in zip(
            one.further_RD, one.tokens_R.tolist(), one.stretch_R.tolist(), strict=True
        ):
            if of == number:
                c *= said(one, state, columns, heat)[token]
        found.append({v: c * p for v, p in said(one, state_D, columns, heat).items()})
    return found


def masses(p: float, q: float) -> float:
    return p * math.log(p / q) - p + q


def pairs_there(number: int) -> dict[int, int]:
    """The student's tokens and their partners in a stretch, where what stands first has no other."""
    pairs = dict(zip(WORDS.student_K.tolist(), WORDS.teacher_K.tolist(), strict=True))
    mine, theirs = int(STUDENT.first_tokens_S[number]), int(TEACHER.first_tokens_S[number])
    return {**{v: u for v, u in pairs.items() if v != mine and u != theirs}, mine: theirs}


def by_hand(distance: Distance) -> list[float]:
    """Every stretch, token by token."""
    heat, b = distance.temperature, distance.divergence.mix
    rows = []
    both = zip(merged(STUDENT, MINE, heat), merged(TEACHER, THEIRS, heat), strict=True)
    for number, (s, t) in enumerate(both):
        pairs, paired = pairs_there(number), 0.0
        for v, u in pairs.items():
            m = b * t[u] + (1 - b) * s[v]
            paired += {
                "forward": masses(t[u], s[v]),
                "reverse": masses(s[v], t[u]),
                "jsd": b * masses(t[u], m) + (1 - b) * masses(s[v], m),
            }[distance.divergence.kind]
        alone_s = sorted((s[v] for v in MINE if v not in pairs), reverse=True)
        alone_t = sorted((t[u] for u in THEIRS if u not in pairs.values()), reverse=True)
        ranks = itertools.zip_longest(alone_s, alone_t, fillvalue=0.0)
        rows.append(heat**2 * paired + distance.unpaired * sum(abs(x - y) for x, y in ranks))
    return rows


def run(
    form: str, student: Stretched, teacher: Stretched, distance: Distance, words: Words = WORDS
) -> StretchLoss:
    if form == "plain":
        return stretch_loss(student, teacher, words, distance)
    return stretch_loss_by_chunk(student, teacher, words, distance, chunk_rows=int(form))


@pytest.mark.parametrize("form", ["plain", "1", "3", "8"])
@pytest.mark.parametrize("distance", DISTANCES, ids=str)
def test_both_forms_are_the_sums_written_out(distance: Distance, form: str) -> None:
    found = run(form, STUDENT, TEACHER, distance)
    wanted = torch.tensor(by_hand(distance), dtype=torch.float64)
    torch.testing.assert_close(found.rows_S, wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.loss, wanted.sum(), rtol=1e-10, atol=1e-12)
    assert bool((wanted >= 0).all())
    shares = [
        sum(said(TEACHER, state, THEIRS, distance.temperature)[u] for u in pairs_there(number).values())
        for number, state in enumerate(TEACHER.first_SD)
    ]
    torch.testing.assert_close(found.paired_S, torch.tensor(shares, dtype=torch.float64))


@pytest.mark.parametrize("form", ["plain", "2"])
@pytest.mark.parametrize("distance", DISTANCES, ids=str)
def test_the_gradient_is_that_of_finite_differences(distance: Distance, form: str) -> None:
    """Of states, head and bias, through the further tokens too."""

    def loss(first_SD: Tensor, further_RD: Tensor, head_VD: Tensor, bias_V: Tensor) -> Tensor:
        moved = STUDENT._replace(first_SD=first_SD, further_RD=further_RD, head_VD=head_VD, bias_V=bias_V)
        return run(form, moved, TEACHER, distance).loss

    bias_V = STUDENT.bias_V
    assert bias_V is not None
    sources = (STUDENT.first_SD, STUDENT.further_RD, STUDENT.head_VD, bias_V)
    assert torch.autograd.gradcheck(loss, tuple(x.clone().requires_grad_() for x in sources))


def test_the_teacher_receives_no_gradient() -> None:
    head_UE = TEACHER.head_VD.clone().requires_grad_()
    for form in ("plain", "2"):
        student = STUDENT._replace(head_VD=STUDENT.head_VD.clone().requires_grad_())
        run(form, student, TEACHER._replace(head_VD=head_UE), Distance()).loss.backward()
        assert head_UE.grad is None
        assert student.head_VD.grad is not None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heat", [1.0, 2.0])
@pytest.mark.parametrize("form", ["plain", "2"])
def test_equal_vocabularies_give_what_response_kl_gives(form: str, heat: float, kind: Kind) -> None:
    """A stretch is then a token, and all columns are pairs; fp32, value and gradient."""
    drawn = torch.Generator().manual_seed(3)
    states_ND, head_VD = torch.randn(6, 8, generator=drawn), torch.randn(11, 8, generator=drawn)
    teacher_NE, head_UE = torch.randn(6, 4, generator=drawn), torch.randn(12, 4, generator=drawn)
    columns_K = torch.arange(10)  # both have rows of padding
    none = torch.zeros(0, dtype=torch.long)
    words = Words(student_K=columns_K, teacher_K=columns_K, student_A=none, teacher_B=none)
    divergence = Divergence(kind, 0.3)
    gradients, losses = [], []
    for is_cross in (True, False):
        moved = [states_ND.clone().requires_grad_(), head_VD.clone().requires_grad_()]
        if is_cross:
            tokens_N = torch.arange(6)
            student = Stretched(moved[0], tokens_N, moved[0][:0], none, none, moved[1])
            teacher = Stretched(teacher_NE, tokens_N, teacher_NE[:0], none, none, head_UE)
            distance = Distance(temperature=heat, divergence=divergence)
            loss = run(form, student, teacher, distance, words).loss
        else:
            loss = head_loss(
                moved[0], moved[1], torch.zeros(6, dtype=torch.long), ce_weight_N=torch.zeros(6),
                teacher_NE=teacher_NE, teacher_head_UE=head_UE, kl_weight_N=torch.ones(6),
                temperature=heat, divergence=divergence, num_common=10,
            ).loss  # fmt: skip
        loss.backward()
        losses.append(loss.detach())
        gradients.append([x.grad for x in moved])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_a_stretch_is_as_likely_as_its_tokens_one_after_the_other() -> None:
    """All texts of two tokens over {a, b} as one stretch: the chances that q gives them sum to 1."""
    head_VD = torch.randn(3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    states = torch.eye(3, dtype=torch.float64)  # the state after nothing, after a, after b
    p = (states @ head_VD.T).softmax(1)
    total = 0.0
    for first, second in itertools.product(range(3), repeat=2):
        after = states[[0, 1, 2][first]][None]
        none = torch.zeros(1, dtype=torch.long)
        one = Stretched(states[:1], torch.tensor([first]), after, torch.tensor([second]), none, head_VD)
        # Compared with itself in everything but `first`: what is left is q of the stretch.
        words = Words(
            student_K=torch.tensor([], dtype=torch.long),
            teacher_K=torch.tensor([], dtype=torch.long),
            student_A=torch.arange(3),
            teacher_B=torch.arange(3),
        )
        found = merged(one, [0, 1, 2], 1.0)[0][first]
        assert found == pytest.approx(float(p[0, first] * p[first, second]))
        assert float(stretch_loss(one, one, words, Distance()).loss) == 0
        total += found
    assert total == pytest.approx(1)


def spelled_out(form: str, distance: Distance) -> float:
    """How log q of the student's stretch moves as its logits follow the loss: a slope.

    It writes l, a, r, g, e; the teacher has these and a sixth token `large`, of which it is sure.
    """
    letters_K, large = torch.arange(5), 5
    words = Words(
        student_K=letters_K, teacher_K=letters_K, student_A=letters_K[:0], teacher_B=torch.tensor([large])
    )
    none, sure = torch.zeros(0, dtype=torch.long), torch.zeros(1, 6, dtype=torch.float64)
    sure[0, large] = 30.0
    z_55 = (2 * torch.eye(5, dtype=torch.float64)).requires_grad_()  # rather likely to write it
    head_VD = torch.eye(6, dtype=torch.float64)
    student = Stretched(
        z_55[:1], letters_K[:1], z_55[1:], letters_K[1:], torch.zeros(4, dtype=torch.long), head_VD[:5, :5]
    )
    teacher = Stretched(sure, torch.tensor([large]), sure[:0], none, none, head_VD)
    found = run(form, student, teacher, distance, words)
    log_q = z_55.log_softmax(1).diagonal().sum()
    slopes = [torch.autograd.grad(value, z_55)[0] for value in (found.loss, log_q)]
    return -float((slopes[0] * slopes[1]).sum())


@pytest.mark.parametrize("form", ["plain", "1"])
@pytest.mark.parametrize("unpaired", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["forward", "jsd"])
def test_a_teacher_sure_of_a_word_raises_the_letters_that_spell_it(
    kind: Kind, unpaired: float, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And by the tables alone it would lower them."""
    distance = Distance(divergence=Divergence(kind), unpaired=unpaired)
    assert spelled_out(form, distance) > 0
    monkeypatch.setattr(Standing, "is_apart_C", property(lambda self: torch.zeros_like(self.own_C).bool()))
    assert spelled_out(form, distance) < 0


@pytest.mark.parametrize("form", ["plain", "2"])
def test_nothing_to_compare_is_zero_with_a_gradient(form: str) -> None:
    empty = [
        one._replace(first_SD=one.first_SD[:0], first_tokens_S=one.first_tokens_S[:0],
                     further_RD=one.further_RD[:0], tokens_R=one.tokens_R[:0], stretch_R=one.stretch_R[:0])
        for one in (STUDENT, TEACHER)
    ]  # fmt: skip
    head_VD = STUDENT.head_VD.clone().requires_grad_()
    found = run(form, empty[0]._replace(head_VD=head_VD), empty[1], Distance())
    found.loss.backward()
    assert float(found.loss) == 0
    assert head_VD.grad is not None
    assert not bool(head_VD.grad.any())


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="the same stretches; the student has 5, the teacher 3"):
        stretch_loss(STUDENT, TEACHER._replace(first_SD=TEACHER.first_SD[:3]), WORDS, Distance())
    with pytest.raises(ValueError, match="stands first in it; the teacher has 5 stretches and 4 such"):
        stretch_loss(STUDENT, TEACHER._replace(first_tokens_S=torch.arange(2, 6)), WORDS, Distance())
    fewer = replace(WORDS, student_K=torch.tensor([4, 3, 2]), student_A=torch.tensor([1, 5]))
    for token in (0, 6):  # before all that are left, and after
        student = STUDENT._replace(first_tokens_S=torch.tensor([4, 4, 1, token, 5]))
        with pytest.raises(ValueError, match=f"a token of its side; the student has {token}"):
            stretch_loss(student, TEACHER, fewer, Distance())
    with pytest.raises(ValueError, match="in pairs; got 3 of the student and 2"):
        stretch_loss(STUDENT, TEACHER, replace(WORDS, teacher_K=WORDS.teacher_K[:2]), Distance())
    with pytest.raises(ValueError, match="above 0; got 0"):
        Distance(temperature=0)
    with pytest.raises(ValueError, match="forward, reverse or jsd; got 'adaptive'"):
        Distance(divergence=Divergence("adaptive"))
