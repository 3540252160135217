"""Inputs of the head loss for tests, and comparison of what comes back.

Shape legend: N rows, V student vocabulary, U teacher vocabulary, D student width, E teacher width.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from llava_kd.losses.reference import HeadLoss

D, E = 16, 24
LEAVES = ("student_ND", "student_head_VD", "student_bias_V")
Inputs = dict[str, Tensor]


def needs_mixed_products() -> None:
    """Skip where no product can be traced without a device that adds to another type, as in torch 2.11."""
    with FakeTensorMode():
        total, rows = (torch.empty(2, 2, dtype=d, device="cuda") for d in (torch.float32, torch.bfloat16))
        try:
            torch.addmm(total, rows, rows, out_dtype=total.dtype)
        except TypeError:
            pytest.skip("this torch cannot trace addmm with an out_dtype")


def make_inputs(
    *, rows: int = 13, student: int = 70, teacher: int = 90, dtype: torch.dtype = torch.float32
) -> Inputs:
    """Rows of four kinds: with cross-entropy, with KL, with both, with neither."""
    generator = torch.Generator().manual_seed(rows + student)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    kind_N = torch.arange(rows) % 4
    targets_N = torch.randint(0, student, (rows,), generator=generator)
    return {
        "student_ND": normal(rows, D),
        "student_head_VD": normal(student, D),
        "student_bias_V": normal(student),
        "targets_N": torch.where(kind_N % 2 == 0, targets_N, -100),
        "ce_weight_N": torch.rand(rows, generator=generator) * (kind_N % 2 == 0),
        "teacher_NE": normal(rows, E),
        "teacher_head_UE": normal(teacher, E),
        "teacher_bias_U": normal(teacher),
        "kl_weight_N": torch.rand(rows, generator=generator) * (kind_N < 2),
    }


def run(path: ModuleType, inputs: Inputs, **options: object) -> HeadLoss:
    return path.head_loss(**{"num_common": 65, **inputs, **options})


def result_and_gradients(path: ModuleType, inputs: Inputs, **options: object) -> dict[str, Tensor]:
    leaves = {name: inputs[name].clone().requires_grad_() for name in LEAVES}
    result = run(path, inputs | leaves, **options)
    gradients = torch.autograd.grad(result.loss * 1.7, list(leaves.values()))
    return {**result._asdict(), **dict(zip(LEAVES, gradients, strict=True))}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], *, tolerance: float) -> None:
    """Relative to the norm of what is expected."""
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        got = actual[name]
        assert (got.dtype, got.shape) == (want.dtype, want.shape), name
        error = (got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-6)
        assert not want.numel() or error <= tolerance, f"{name}: {float(error)}"
