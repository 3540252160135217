"""The differences-of-logits loss: an oracle by hand, its identities, and the fast form against the plain one.

Shape legend: N rows, V student vocabulary, U teacher vocabulary, D and E widths, C common columns.
"""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from loss_inputs import assert_same
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llava_kd.losses import dbild, reference

FORMS = [pytest.param(reference.dbild_loss, id="reference"), pytest.param(dbild.dbild_loss, id="fast")]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def heads(rows: int, *, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        "student_ND": normal(rows, 6, seed=1, dtype=dtype),
        "student_head_VD": normal(40, 6, seed=2, dtype=dtype),
        "teacher_NE": normal(rows, 8, seed=3, dtype=dtype),
        "teacher_head_UE": normal(44, 8, seed=4, dtype=dtype),
        "student_bias_V": normal(40, seed=5, dtype=dtype),
        "teacher_bias_U": normal(44, seed=6, dtype=dtype),
    }


def knee_by_hand(values: list[float]) -> int:
    """The last of the falling values that lie before the tail."""
    last = len(values) - 1
    below = [
        (1 - rank / last) - (value - values[last]) / (values[0] - values[last])
        for rank, value in enumerate(values)
    ]
    return min(max(below.index(max(below)) + 1, min(4, len(values))), len(values))


def row_by_hand(student: list[float], teacher: list[float], temperature: float, candidates: int) -> float:
    """Pair by pair, in plain floats."""
    total = 0.0
    for leader in (teacher, student):
        order = sorted(range(len(leader)), key=lambda c: -leader[c])[:candidates]
        chosen = order[: knee_by_hand([leader[c] for c in order])]
        pairs = list(combinations(chosen, 2))
        weights = {}
        for name, z in (("s", student), ("t", teacher)):
            raw = [math.exp((z[i] - z[j]) / temperature) for i, j in pairs]
            weights[name] = [value / sum(raw) for value in raw]
        total += sum(s * math.log(s / t) for s, t in zip(weights["s"], weights["t"], strict=True))
    return temperature**2 * total


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("temperature", "candidates"), [(3.0, 64), (1.0, 12), (2.0, 4)])
def test_a_row_is_what_its_definition_says(form, temperature: float, candidates: int) -> None:
    inputs = heads(5, dtype=torch.float64)
    result = form(**inputs, temperature=temperature, candidates=candidates, num_common=37)
    student_NC = (inputs["student_ND"] @ inputs["student_head_VD"].T + inputs["student_bias_V"])[:, :37]
    teacher_NC = (inputs["teacher_NE"] @ inputs["teacher_head_UE"].T + inputs["teacher_bias_U"])[:, :37]
    expected = [
        row_by_hand(s, t, temperature, candidates)
        for s, t in zip(student_NC.tolist(), teacher_NC.tolist(), strict=True)
    ]
    assert result.rows_N.tolist() == pytest.approx(expected, rel=1e-9)
    assert float(result.loss) == pytest.approx(sum(expected), rel=1e-9)


def test_the_knee_of_a_hand_drawn_curve() -> None:
    # Six large values, a drop, and a flat tail of ten: the knee is the first value of the tail.
    curve_NK = torch.tensor([[20.0, 19.8, 19.6, 19.4, 19.2, 19.0, *([1.0] * 9), 0.9]])
    assert reference.knee(curve_NK).tolist() == [7]
    assert reference.knee(torch.ones(1, 16)).tolist() == [4]  # nothing stands out
    assert reference.knee(torch.tensor([[9.0, 1, 1, 1, 1, 1, 1, 0.9]])).tolist() == [4]  # never fewer
    assert reference.knee(torch.tensor([[3.0, 2.0]])).tolist() == [2]


@pytest.mark.parametrize("form", FORMS)
def test_equal_logits_cost_nothing_and_pull_nowhere(form) -> None:
    inputs = heads(6, dtype=torch.float64)
    same_ND = inputs["student_ND"].requires_grad_()
    result = form(same_ND, inputs["student_head_VD"], same_ND.detach() * 1, inputs["student_head_VD"])
    result.loss.backward()
    assert float(result.loss.detach()) == 0
    assert float(same_ND.grad.abs().max()) < 1e-10


def test_the_divergence_is_the_reverse_one_and_leads_from_both_sides() -> None:
    """Swapping the sides keeps the two leaders but turns the KL round, so the value changes."""
    student_NC, teacher_NC = normal(4, 12, seed=7), normal(4, 12, seed=8)
    one = reference.dbild_rows(student_NC, teacher_NC, temperature=3.0, candidates=12)
    other = reference.dbild_rows(teacher_NC, student_NC, temperature=3.0, candidates=12)
    assert not torch.allclose(one, other, rtol=1e-2)
    # A student sure of a token that the teacher ranks last: only the student-led half sees it.
    teacher_NC = torch.linspace(6, 0, 40).unsqueeze(0)
    student_NC = teacher_NC.clone()
    student_NC[0, 39] = 30.0
    assert float(reference.dbild_rows(student_NC, teacher_NC, temperature=3.0, candidates=8)) > 1


def test_a_shift_of_all_logits_changes_nothing() -> None:
    student_NC, teacher_NC = normal(4, 30, seed=7), normal(4, 30, seed=8)
    plain = reference.dbild_rows(student_NC, teacher_NC, temperature=3.0, candidates=16)
    shifted = reference.dbild_rows(student_NC + 5, teacher_NC - 9, temperature=3.0, candidates=16)
    torch.testing.assert_close(plain, shifted, rtol=1e-4, atol=1e-5)


def result_and_gradients(form, inputs: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    names = ("student_ND", "student_head_VD", "student_bias_V")
    leaves = {name: inputs[name].clone().requires_grad_() for name in names}
    result = form(**inputs | leaves, num_common=37, **options)
    gradients = torch.autograd.grad(result.loss * 1.7, list(leaves.values()))
    return {**result._asdict(), **dict(zip(names, gradients, strict=True))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_rows", [1, 5, 13, 100])
def test_the_fast_form_agrees_with_the_plain_one(chunk_rows: int, dtype: torch.dtype) -> None:
    inputs = heads(13, dtype=dtype)
    expected = result_and_gradients(reference.dbild_loss, inputs)
    got = result_and_gradients(dbild.dbild_loss, inputs, chunk_rows=chunk_rows)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert_same(got, expected, tolerance=tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_finite_differences(form) -> None:
    inputs = heads(2, dtype=torch.float64)
    fixed = {name: inputs[name] for name in ("teacher_NE", "teacher_head_UE")}

    def loss(student_ND: Tensor, head_VD: Tensor) -> Tensor:
        return form(student_ND, head_VD, **fixed, num_common=37).loss

    leaves = (inputs["student_ND"].requires_grad_(), inputs["student_head_VD"].requires_grad_())
    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("form", FORMS)
def test_the_teacher_gets_no_gradient_and_a_frozen_head_none(form) -> None:
    inputs = heads(3)
    for name in ("student_ND", "teacher_NE", "teacher_head_UE"):
        inputs[name].requires_grad_()
    form(**inputs).loss.backward()
    assert inputs["student_ND"].grad is not None
    assert [inputs[name].grad for name in ("teacher_NE", "teacher_head_UE", "student_head_VD")] == [None] * 3


@pytest.mark.parametrize("form", FORMS)
def test_no_rows_is_a_zero_that_reaches_the_head(form) -> None:
    inputs = heads(0)
    inputs["student_head_VD"].requires_grad_()
    result = form(**inputs)
    result.loss.backward()
    assert float(result.loss.detach()) == 0
    assert not bool(inputs["student_head_VD"].grad.any())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"candidates": 3}, "candidates must be at least 4"),
        ({"num_common": 41}, r"num_common must lie in 2\.\.40"),
        ({"teacher_NE": torch.zeros(9, 8)}, "must have the same rows; got 3 and 9"),
        ({"teacher_NE": torch.zeros(3, 5)}, "teacher rows .* must agree in width"),
    ],
)
def test_bad_input_is_named(form, change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        form(**heads(3) | change)


class LargestFp32(TorchDispatchMode):
    """Elements of the largest fp32 tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # pyright: ignore
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32:
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("num_common", [20_000, 20_480])
def test_no_fp32_copy_of_the_teachers_head_is_made(num_common: int) -> None:
    inputs = {
        "student_ND": normal(24, 4, seed=1, dtype=torch.bfloat16).requires_grad_(),
        "student_head_VD": normal(20_480, 4, seed=2, dtype=torch.bfloat16).requires_grad_(),
        "teacher_NE": normal(24, 64, seed=3, dtype=torch.bfloat16),
        "teacher_head_UE": normal(20_480, 64, seed=4, dtype=torch.bfloat16),
        "teacher_bias_U": normal(20_480, seed=5),
    }
    with LargestFp32() as made:
        result = dbild.dbild_loss(**inputs, num_common=num_common, chunk_rows=8)
        result.loss.backward()
    assert 0 < made.elements < inputs["teacher_head_UE"].numel() / 2
    expected = reference.dbild_loss(**inputs, num_common=num_common)
    torch.testing.assert_close(result.rows_N, expected.rows_N, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("trained", "wide_copies"), [(False, 0), (True, 1)])
def test_the_students_head_is_widened_for_its_gradient_alone(trained: bool, wide_copies: int) -> None:
    inputs = {
        "student_ND": normal(24, 64, seed=1, dtype=torch.bfloat16).requires_grad_(),
        "student_head_VD": normal(20_480, 64, seed=2, dtype=torch.bfloat16).requires_grad_(trained),
        "teacher_NE": normal(24, 4, seed=3, dtype=torch.bfloat16),
        "teacher_head_UE": normal(20_480, 4, seed=4, dtype=torch.bfloat16),
    }
    size = inputs["student_head_VD"].numel()
    with NewStorages(size) as made:
        dbild.dbild_loss(**inputs, chunk_rows=8)
    assert len(made.found) == wide_copies


class NewStorages(TorchDispatchMode):
    """Where the fp32 tensors of at least so many elements, that any operation returned, lie in memory."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements = elements
        self.found: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # pyright: ignore
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if (
                isinstance(tensor, Tensor)
                and tensor.dtype == torch.float32
                and tensor.numel() >= self.elements
            ):
                self.found.add(tensor.untyped_storage().data_ptr())
        return result
