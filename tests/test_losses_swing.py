"""Soft targets at a temperature and with noise of each row's own, in the plain form and the fused one.

Shape legend: N rows, V columns, D width.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from llava_kd.losses import head_loss as fast
from llava_kd.losses import reference
from llava_kd.losses.divergence import FORWARD, Divergence
from llava_kd.losses.targets.noise import random_distributions, uniform
from llava_kd.losses.targets.swing import SwingTarget

ROWS, COMMON, VOCABULARY = 6, 37, 41


def one_hash(x: int) -> int:
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) % 2**32
    return x ^ (x >> 16)


def by_hand(key: int, columns: int) -> list[float]:
    """The noise of a row in plain whole numbers."""
    low, high = key % 2**32, key >> 32
    hashes = [one_hash(one_hash((one_hash(v) + low) % 2**32) ^ high) for v in range(columns)]
    drawn = [-math.log(((h >> 9) + 0.5) / 2**23) for h in hashes]
    return [value / sum(drawn) for value in drawn]


def test_noise_is_that_of_plain_whole_numbers() -> None:
    keys = [0, 5, 2**62 + 12345, 2**63 - 1]
    found = random_distributions(torch.tensor(keys), 50)
    torch.testing.assert_close(found, torch.tensor([by_hand(key, 50) for key in keys]), rtol=1e-5, atol=1e-9)


def test_noise_is_uniform_and_rows_and_columns_are_unrelated() -> None:
    drawn = uniform(torch.arange(200) * 2**32 + torch.arange(200), 500).double()
    assert float(drawn.min()) > 0
    assert float(drawn.max()) < 1
    assert float(drawn.mean()) == pytest.approx(0.5, abs=0.003)  # 3.3 deviations of 1e5 numbers
    assert float(drawn.std()) == pytest.approx(12**-0.5, abs=0.002)
    centred = drawn - 0.5
    for a, b in ((centred[1:], centred[:-1]), (centred[:, 1:], centred[:, :-1])):
        assert abs(float((a * b).mean()) * 12) < 0.015


class Case:
    """Both sides of some rows; the teacher has a bias, and columns beyond the common ones."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.student_ND, self.student_head_VD = drawn(ROWS, 5).requires_grad_(), drawn(COMMON, 5)
        self.teacher_NE, self.teacher_head_VE = drawn(ROWS, 7), drawn(VOCABULARY, 7)
        self.bias_V = drawn(VOCABULARY)
        self.weight_N = torch.tensor([0.5, 0.25, 0.0, 1.0, 0.75, 0.3], dtype=torch.float64)

    def loss(self, head_loss, change, divergence: Divergence = FORWARD, **more: object) -> tuple:
        result = head_loss(
            self.student_ND, self.student_head_VD, torch.zeros(ROWS, dtype=torch.long),
            ce_weight_N=torch.zeros(ROWS, dtype=torch.float64), teacher_NE=self.teacher_NE,
            teacher_head_UE=self.teacher_head_VE, teacher_bias_U=self.bias_V, kl_weight_N=self.weight_N,
            temperature=2.0, divergence=divergence, num_common=COMMON, teacher_change=change, **more,
        )  # fmt: skip
        return result, torch.autograd.grad(result.loss, self.student_ND)[0]


CHANGE = SwingTarget(
    heat_N=torch.tensor([1.0, 25.0, 4.0, 1.0, 3.0, 1.0]),
    noise_N=torch.tensor([0.0, 0.0, 0.0, 0.5, 0.2, 0.0]),
    key_N=torch.tensor([1, 2, 3, 4, 5, 6]) * 2**33 + 7,
    temperature=2.0,
    num_common=COMMON,
)


def test_the_loss_is_that_of_the_formula() -> None:
    case = Case()
    teacher = (case.teacher_NE @ case.teacher_head_VE.T + case.bias_V)[:, :COMMON]
    heat = CHANGE.heat_N.double()[:, None]
    noise = CHANGE.noise_N.double()[:, None]
    drawn = torch.tensor([by_hand(key, COMMON) for key in CHANGE.key_N.tolist()], dtype=torch.float64)
    target = ((teacher / (2 * heat)).softmax(1) + noise * drawn) / (1 + noise)
    student = (case.student_ND @ case.student_head_VD.T / 2).log_softmax(1)
    rows = 4 * (target * (target.log() - student)).sum(1)  # the square of 2, not of 2 times the heat
    found, gradient = case.loss(reference.head_loss, CHANGE)
    expected = (case.weight_N * rows).sum()
    torch.testing.assert_close(found.loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        gradient, torch.autograd.grad(expected, case.student_ND)[0], rtol=1e-5, atol=1e-8
    )


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd", "adaptive"])
@pytest.mark.parametrize("chunk_rows", [None, 2])
def test_the_fused_head_says_what_the_plain_one_does(kind, chunk_rows: int | None) -> None:
    plain, plain_gradient = Case().loss(reference.head_loss, CHANGE, Divergence(kind))
    fused, fused_gradient = Case().loss(fast.head_loss, CHANGE, Divergence(kind), chunk_rows=chunk_rows)
    torch.testing.assert_close(fused.loss, plain.loss, rtol=1e-9, atol=0)
    torch.testing.assert_close(fused.kl_N, plain.kl_N, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(fused_gradient, plain_gradient, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("head_loss", [reference.head_loss, fast.head_loss])
def test_rows_of_heat_one_without_noise_stay_bit_for_bit(head_loss) -> None:
    case = Case()
    found, _ = case.loss(head_loss, CHANGE)
    plain, _ = case.loss(head_loss, None)
    same = (CHANGE.heat_N == 1) & (CHANGE.noise_N == 0)
    assert torch.equal(found.kl_N[same], plain.kl_N[same])
    assert bool((found.kl_N != plain.kl_N)[~same & (case.weight_N > 0)].all())


def test_a_hot_teacher_says_next_to_nothing_and_much_noise_says_the_noise() -> None:
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(0)) * 5
    hot = SwingTarget(
        heat_N=torch.tensor([1e6, 1.0]),
        noise_N=torch.tensor([0.0, 1e6]),
        key_N=torch.tensor([1, 2]),
        temperature=1.0,
        num_common=9,
    )
    hot(torch.arange(2), logits)
    said = logits.softmax(1)
    torch.testing.assert_close(said[0], torch.full((9,), 1 / 9), rtol=1e-4, atol=0)
    torch.testing.assert_close(said[1:], random_distributions(torch.tensor([2]), 9), rtol=1e-4, atol=1e-6)
