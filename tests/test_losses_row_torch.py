"""The row kernels in plain PyTorch against autograd through the plain formulas, and against loops.

Shape legend: C rows, V student vocabulary, U teacher vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from llava_kd.losses.divergence import (
    KINDS,
    Divergence,
    Kind,
    Temperature,
    divergence_rows,
    softened,
    squared,
)
from llava_kd.losses.kernels import row_torch
from llava_kd.losses.kernels.row_torch import torch_rows

C, V, U, COMMON = 7, 11, 13, 9
MIX = 0.3


def made(**changes: Any) -> dict[str, Any]:
    """fp64 logits; rows with and without a cross-entropy weight, all with a KL weight."""
    drawn = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return 2 * torch.randn(*shape, generator=drawn, dtype=torch.float64)

    return {
        "student_CV": normal(C, V),
        "teacher_CU": normal(C, U),
        "targets_C": torch.tensor([0, -100, 10, 4, -100, 9, 1]),
        "ce_weight_C": torch.tensor([0.5, 0.0, 2.0, 1.0, 0.0, 0.25, 3.0], dtype=torch.float64),
        "kl_weight_C": torch.tensor([1.0, 0.5, 2.0, 0.75, 3.0, 0.1, 1.5], dtype=torch.float64),
        "student_bias_V": normal(V),
        "teacher_bias_U": normal(U),
        "temperature": 1.0,
        "divergence": Divergence("forward", MIX),
        "num_common": COMMON,
        "gradient_CV": torch.full((C, V), math.nan, dtype=torch.float64),
    } | changes


def by_autograd(given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy and divergence of each row, and the gradient of their weighted sum."""
    logits_CV = given["student_CV"].double().clone().requires_grad_()
    biased_CV = logits_CV if given["student_bias_V"] is None else logits_CV + given["student_bias_V"]
    targets_C = given["targets_C"].clamp_min(0)
    ce_C = -biased_CV.log_softmax(1)[torch.arange(len(targets_C)), targets_C]
    ce_C = torch.where(given["ce_weight_C"] != 0, ce_C, 0.0)
    loss, kl_C = (given["ce_weight_C"] * ce_C).sum(), torch.zeros_like(ce_C)
    if given["teacher_CU"] is not None:
        theirs_CU = given["teacher_CU"].double()
        if given["teacher_bias_U"] is not None:
            theirs_CU = theirs_CU + given["teacher_bias_U"]
        num, heat = given["num_common"], given["temperature"]
        logp_CN, logq_CN = (softened(z_CV[:, :num], heat).log_softmax(1) for z_CV in (biased_CV, theirs_CU))
        kl_C = squared(heat) * divergence_rows(logp_CN, logq_CN, given["divergence"])
        loss = loss + (given["kl_weight_C"] * kl_C).sum()
    (gradient_CV,) = torch.autograd.grad(loss, logits_CV)
    return ce_C.detach(), kl_C.detach(), gradient_CV


def check(given: dict[str, Any]) -> None:
    want = by_autograd(given)
    ce_C, kl_C = torch_rows(**given)
    for got, expected in zip((ce_C, kl_C, given["gradient_CV"]), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    told = {**given, "gradient_CV": None}
    for got, expected in zip(torch_rows(**told), (ce_C, kl_C), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("elements", [1, 3 * V, 2**17], ids=["a row", "three rows", "all rows"])
@pytest.mark.parametrize("temperature", [1.0, 2.5, "std"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradient_are_those_of_the_formulas(
    kind: Kind, temperature: Temperature, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_torch, "ELEMENTS_AT_A_TIME", elements)
    check(made(divergence=Divergence(kind, MIX), temperature=temperature))


@pytest.mark.parametrize("kind", ["forward", "jsd"])
def test_every_column_may_be_common_and_biases_may_lack(kind: Kind) -> None:
    for temperature in (1.0, 0.5, "std"):
        check(
            made(
                divergence=Divergence(kind, MIX), temperature=temperature, num_common=V, student_bias_V=None,
                teacher_bias_U=None,
            )
        )  # fmt: skip


def test_without_a_teacher_only_the_cross_entropy_is_left() -> None:
    for lacks in ({"teacher_CU": None}, {"kl_weight_C": None}, {"teacher_CU": None, "kl_weight_C": None}):
        given = made(**lacks)
        want = by_autograd({**given, "teacher_CU": None})
        ce_C, kl_C = torch_rows(**given)
        torch.testing.assert_close(ce_C, want[0])
        assert kl_C.tolist() == [0.0] * C
        torch.testing.assert_close(given["gradient_CV"], want[2])


def test_without_cross_entropy_the_other_columns_have_no_gradient() -> None:
    for num_common in (COMMON, V):
        given = made(ce_weight_C=torch.zeros(C, dtype=torch.float64), num_common=num_common)
        check(given)
        assert given["gradient_CV"][:, num_common:].count_nonzero() == 0
    nothing = made(ce_weight_C=torch.zeros(C, dtype=torch.float64), teacher_CU=None)
    assert [values.tolist() for values in torch_rows(**nothing)] == [[0.0] * C] * 2
    assert nothing["gradient_CV"].count_nonzero() == 0


def test_a_gradient_may_lie_over_the_logits() -> None:
    for kind in KINDS:
        given = made(divergence=Divergence(kind, MIX), temperature=2.0)
        want = by_autograd(given)
        given["gradient_CV"] = given["student_CV"]
        torch_rows(**given)
        torch.testing.assert_close(given["gradient_CV"], want[2], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_a_standard_teacher_is_not_divided_again(kind: Kind) -> None:
    given = made(temperature="std", divergence=Divergence(kind, MIX), teacher_bias_U=None)
    whole = torch_rows(**given)
    common_CU = given["teacher_CU"][:, :COMMON]
    divided_CU = (common_CU - common_CU.mean(1, keepdim=True)) / common_CU.std(1, keepdim=True)
    told = {**given, "teacher_CU": divided_CU, "is_teacher_standard": True}
    torch.testing.assert_close(torch_rows(**told)[1], whole[1])
    told["teacher_CU"] = 3 * divided_CU  # would change nothing where it is divided
    assert (torch_rows(**told)[1] - whole[1]).abs().max() > 1e-2
    told["temperature"] = 1.0  # where it says nothing
    both = [torch_rows(**{**told, "is_teacher_standard": is_standard})[1] for is_standard in (False, True)]
    assert torch.equal(*both)


@pytest.mark.parametrize("target", [-1, V, V + 5])
def test_a_target_outside_the_vocabulary_is_a_row_of_nan(target: int) -> None:
    given = made(teacher_CU=None)
    want = by_autograd(given)
    given["targets_C"][2] = target
    given["targets_C"][4] = target  # without a weight it does not matter
    ce_C, _ = torch_rows(**given)
    others = [0, 1, 3, 4, 5, 6]
    assert ce_C[2].isnan()
    assert given["gradient_CV"][2].isnan().all()
    torch.testing.assert_close(ce_C[others], want[0][others])
    torch.testing.assert_close(given["gradient_CV"][others], want[2][others])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["student_CV", "teacher_CU"])
def test_what_is_no_number_stays_in_its_row(kind: Kind, side: str) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        given = made(divergence=Divergence(kind, MIX), temperature=2.0)
        given[side][3, 2] = bad
        ce_C, kl_C = torch_rows(**given)
        assert kl_C.isnan().nonzero().flatten().tolist() == [3]
        assert bool(ce_C[3].isnan()) == (side == "student_CV" and bad != -math.inf)
        assert ce_C[[0, 1, 2, 4, 5, 6]].isfinite().all()
        assert given["gradient_CV"][[0, 1, 2, 4, 5, 6]].isfinite().all()
        if side == "student_CV" and math.isnan(bad):  # else the value alone, which makes the loss NaN
            assert given["gradient_CV"][3].isnan().any()


def test_half_logits_are_widened_and_an_overflow_is_seen() -> None:
    given = made(student_bias_V=None, teacher_bias_U=None, temperature=2.0)
    for name in ("student_CV", "teacher_CU"):
        given[name] = given[name].half()
    want = by_autograd(given)
    given["gradient_CV"] = torch.zeros(C, V)
    given["ce_weight_C"], given["kl_weight_C"] = given["ce_weight_C"].float(), given["kl_weight_C"].float()
    ce_C, kl_C = torch_rows(**given)
    assert (ce_C.dtype, kl_C.dtype) == (torch.float32, torch.float32)
    for got, expected in zip((ce_C, kl_C, given["gradient_CV"]), want, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    given["student_CV"][2, 3] = -math.inf  # of a single column, which a softmax would not show
    ce_C, kl_C = torch_rows(**given)
    assert ce_C.isnan().nonzero().flatten().tolist() == [2]
    assert kl_C.isnan().nonzero().flatten().tolist() == [2]


def test_a_row_without_spread_is_divided_by_one() -> None:
    given = made(temperature="std", divergence=Divergence("reverse", MIX), student_bias_V=None)
    given["student_CV"][1] = 4.0
    want = by_autograd(given)
    _, kl_C = torch_rows(**given)
    torch.testing.assert_close(kl_C, want[1])
    assert given["gradient_CV"].isfinite().all()
    one = made(temperature="std", divergence=Divergence("reverse", MIX), num_common=1)
    _, kl_C = torch_rows(**one)
    assert kl_C.tolist() == [0.0] * C


def test_a_shift_of_all_logits_changes_nothing() -> None:
    for kind in KINDS:
        told = {"divergence": Divergence(kind, MIX), "temperature": 2.0, "student_bias_V": None}
        before, after = made(**told), made(**told)
        after["student_CV"] += 700
        after["teacher_CU"] -= 700
        values = [torch_rows(**given) for given in (before, after)]
        for one, other in zip(*values, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(before["gradient_CV"], after["gradient_CV"], rtol=1e-9, atol=1e-10)


def test_the_tail_is_looked_for_among_the_largest_columns_and_then_among_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(row_torch, "LARGEST", 3)
    sorted_for: list[int] = []
    whole = row_torch.tail_share
    monkeypatch.setattr(row_torch, "tail_share", lambda *a: (sorted_for.append(1), whole(*a))[1])
    peaked = torch.tensor([[0.5, 0.3, 0.1, 0.05, 0.05]], dtype=torch.float64)
    flat = torch.full((1, 5), 0.2, dtype=torch.float64) + torch.tensor([[0.02, 0.01, 0, -0.01, -0.02]])
    exact = torch.tensor([[0.25, 0.125, 0.125, 0.25, 0.25]], dtype=torch.float64)
    student = torch.tensor([[0.1, 0.2, 0.3, 0.15, 0.25]], dtype=torch.float64).log()
    for teacher, head, sorts in ((peaked, 0.55, 0), (peaked, 0.85, 0), (flat, 0.7, 1), (exact, 0.75, 1)):
        sorted_for.clear()
        found = row_torch._tail_share(student, teacher.log(), head)
        torch.testing.assert_close(found, whole(student, teacher.log(), head))
        assert len(sorted_for) == sorts
    both = row_torch._tail_share(student.expand(2, 5), torch.cat([peaked, flat]).log(), 0.7)
    torch.testing.assert_close(both, whole(student.expand(2, 5), torch.cat([peaked, flat]).log(), 0.7))
    assert len(sorted_for) == 2


def test_a_divergence_without_a_formula_is_refused() -> None:
    another = Divergence()
    object.__setattr__(another, "kind", "another")
    with pytest.raises(ValueError, match="lacks the divergence 'another'"):
        torch_rows(**made(divergence=another, temperature=2.0))
