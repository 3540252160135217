"""Several teachers' soft targets mixed into one, in the plain form and the fused one; KnFu's weights by hand.

Shape legend: N rows, D and E widths, V rows of a head, M teachers, K types.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from llava_kd.losses import head_loss as fast
from llava_kd.losses import reference
from llava_kd.losses.divergence import FORWARD, Divergence
from llava_kd.losses.targets.mixture import MixedTarget, Voice, histograms, log_fusion_weights

ROWS, COMMON = 6, 37
FORMS = {"plain": reference.head_loss, "fused": fast.head_loss}


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Of other widths, with other rows beyond the common ones, with a bias and without.
VOICES = (
    Voice(drawn(1, ROWS, 7), drawn(2, 41, 7), drawn(3, 41)),
    Voice(drawn(4, ROWS, 5), drawn(5, COMMON, 5), None),
    Voice(drawn(6, ROWS, 9), drawn(7, 44, 9), drawn(8, 44)),
)
WEIGHTS_NM = drawn(9, ROWS, 3).softmax(1)
STUDENT_ND, HEAD_VD = drawn(10, ROWS, 5), drawn(11, COMMON, 5)
WEIGHT_N = torch.tensor([0.5, 0.25, 0.0, 1.0, 0.75, 0.3], dtype=torch.float64)


def loss(form: str, voices=VOICES, weights_NM=WEIGHTS_NM, divergence: Divergence = FORWARD, **more) -> tuple:
    first, *others = voices
    change = None
    if others:
        change = MixedTarget(
            others=tuple(others), log_weights_NM=weights_NM.log(), temperature=2.0, num_common=COMMON
        )
    student_ND = STUDENT_ND.clone().requires_grad_()
    result = FORMS[form](
        student_ND, HEAD_VD, torch.zeros(ROWS, dtype=torch.long),
        ce_weight_N=torch.zeros(ROWS, dtype=torch.float64), teacher_NE=first.hidden_NE,
        teacher_head_UE=first.head_UE, teacher_bias_U=first.bias_U, kl_weight_N=WEIGHT_N, temperature=2.0,
        divergence=divergence, num_common=COMMON, teacher_change=change, **more,
    )  # fmt: skip
    return result.kl_N, torch.autograd.grad(result.loss, student_ND)[0]


def by_hand(n: int) -> float:
    """The divergence of one row, column by column in plain numbers."""

    def said(hidden_D: Tensor, head_VD: Tensor, bias_V: Tensor | None) -> list[float]:
        logits = (head_VD @ hidden_D + (0 if bias_V is None else bias_V))[:COMMON].tolist()
        masses = [math.exp(z / 2.0) for z in logits]
        return [mass / sum(masses) for mass in masses]

    teachers = [said(v.hidden_NE[n], v.head_UE, v.bias_U) for v in VOICES]
    target = [
        sum(float(w) * p[v] for w, p in zip(WEIGHTS_NM[n], teachers, strict=True)) for v in range(COMMON)
    ]
    student = said(STUDENT_ND[n], HEAD_VD, None)
    return 4.0 * sum(q * math.log(q / p) for q, p in zip(target, student, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_a_row_is_that_of_plain_numbers(form: str) -> None:
    kl_N, _ = loss(form)
    for n in range(ROWS):
        assert float(kl_N[n]) == pytest.approx(by_hand(n) if WEIGHT_N[n] else 0.0, rel=1e-9), n


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd", "total_variation", "adaptive"])
def test_both_forms_agree_in_chunks_of_any_size(kind) -> None:
    plain = loss("plain", divergence=Divergence(kind))
    for chunk_rows in (1, 4, 6):
        fused = loss("fused", divergence=Divergence(kind), chunk_rows=chunk_rows)
        torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_copies_of_a_teacher_are_that_teacher(form: str) -> None:
    alone = loss(form, voices=VOICES[:1])
    torch.testing.assert_close(loss(form, voices=VOICES[:1] * 3), alone, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_the_order_of_the_teachers_does_not_matter(form: str) -> None:
    other = loss(form, voices=(VOICES[2], VOICES[0], VOICES[1]), weights_NM=WEIGHTS_NM[:, [2, 0, 1]])
    torch.testing.assert_close(other, loss(form), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_a_teacher_with_all_the_weight_is_alone(form: str) -> None:
    only_NM = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64).expand(ROWS, 3)
    torch.testing.assert_close(
        loss(form, weights_NM=only_NM), loss(form, voices=VOICES[1:2]), rtol=1e-9, atol=1e-12
    )


def test_teachers_without_a_weight_each_are_refused() -> None:
    with pytest.raises(ValueError, match="each teacher needs a weight; there are 3 teachers and 2 weights"):
        loss("plain", weights_NM=WEIGHTS_NM[:, :2])


# Weights ----

COUNTS = [[5, 3, 0], [4, 4, 0], [0, 0, 6], [0, 2, 7]]


def weights_by_hand(beta: float) -> list[float]:
    own, *theirs = [[(c + 1) / (sum(row) + 3) for c in row] for row in COUNTS]
    kls = [sum(h * math.log(h / g) for h, g in zip(own, other, strict=True)) for other in theirs]
    factors = [math.exp(-beta * kl) for kl in kls]
    return [factor / sum(factors) for factor in factors]


@pytest.mark.parametrize("beta", [1.0, 10.0])
def test_knfu_weights_are_those_of_plain_numbers(beta: float) -> None:
    own_K, *theirs = histograms(COUNTS)
    found = log_fusion_weights(own_K, torch.stack(theirs), beta=beta).exp()
    assert found.tolist() == pytest.approx(weights_by_hand(beta), rel=1e-12)
    assert found[0] == found.max()


def test_alike_histograms_weigh_alike() -> None:
    shares_MK = histograms([[8, 2]] * 3)
    found = log_fusion_weights(shares_MK[0], shares_MK, beta=10.0).exp()
    assert found.tolist() == pytest.approx([1 / 3] * 3)
