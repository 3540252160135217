"""The Gram form of the relation loss against the reference.

Shape legend: I images, N tokens of an image, V student vocabulary, U teacher vocabulary, D student width,
E teacher width.
"""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from loss_inputs import needs_mixed_products
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from llava_kd.losses import reference, relation
from llava_kd.losses.kernels import gemm
from llava_kd.losses.relation import head_gram

IMAGES, N, D, E, V, U = 3, 11, 16, 24, 50, 60
BOTH = pytest.mark.parametrize("path", [reference, relation], ids=["reference", "fast"])
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-3}


def make_inputs(*, images: int = IMAGES, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(images)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) + 0.5).to(dtype)

    return {
        "student_IND": normal(images, N, D),
        "teacher_IME": normal(images, N, E),
        "student_head_VD": normal(V, D),
        "teacher_head_UE": normal(U, E),
    }


def rows_and_gradients(path: ModuleType, inputs: dict[str, Tensor], **options: object) -> list[Tensor]:
    """Rows, and gradients of the student's inputs under a different upstream gradient for each image."""
    leaves = [t.requires_grad_() for name, t in inputs.items() if name.startswith("student_")]
    rows_I = path.relation_rows(**inputs, **options)
    upstream_I = 1.7 * torch.arange(1, len(rows_I) + 1, dtype=rows_I.dtype)
    return [rows_I.detach(), *torch.autograd.grad(rows_I, leaves, upstream_I)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("tap", ["logits", "features"])
@pytest.mark.parametrize("centre", [False, True], ids=["raw", "centred"])
@pytest.mark.parametrize("lengths", ["", "normalise", "normalise_rows"])
def test_gram_form_equals_reference(dtype: torch.dtype, tap: str, centre: bool, lengths: str):
    inputs = make_inputs(dtype=dtype)
    if tap == "features":
        inputs = {name: t for name, t in inputs.items() if "head" not in name}
    how = {"centre": centre, **({lengths: True} if lengths else {})}
    expected = rows_and_gradients(reference, inputs, **how)
    actual = rows_and_gradients(relation, inputs, **how)
    for want, got in zip(expected, actual, strict=True):
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        assert (got.double() - want.double()).norm() <= TOLERANCE[dtype] * want.double().norm()


def test_capped_logits_of_a_head_in_another_type_are_those_of_its_numbers():
    inputs = make_inputs(dtype=torch.bfloat16)
    wide = {name: t.float() for name, t in inputs.items()}
    heads = {name: t for name, t in inputs.items() if "head" in name}
    caps = {"student_cap": 3.0, "teacher_cap": 2.0}
    rows = [relation.relation_rows(**given, **caps) for given in (wide, wide | heads)]
    assert torch.equal(*rows)


def test_unit_lengths_of_tokens_that_cancel_in_the_gram_are_no_nan():
    """A component that all rows of a head share lets rounding leave a token's squared length below 0."""
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        head_VD = torch.randn(50, 16, generator=generator) * 1e-3 + 300 * torch.randn(16, generator=generator)
        features_IND = torch.randn(2, 11, 16, generator=generator)
        shared_D = head_VD.mean(0)
        features_IND -= (features_IND @ shared_D)[..., None] * shared_D / shared_D.square().sum()
        leaf_IND = features_IND.clone().requires_grad_()
        rows_I = relation.relation_rows(
            leaf_IND,
            torch.randn(2, 11, 16, generator=generator),
            student_head_VD=head_VD,
            teacher_head_UE=head_VD,
            normalise=True,
        )
        rows_I.sum().backward()
        assert rows_I.isfinite().all(), seed
        assert leaf_IND.grad is not None
        assert leaf_IND.grad.isfinite().all(), seed


@pytest.mark.parametrize("path", [reference, relation], ids=["reference", "fast"])
def test_centred_rows_are_precise_where_a_shared_component_dominates(path: ModuleType):
    """Real logits of visual tokens share most of what they hold; fp32 must not lose the rest."""
    inputs = make_inputs(dtype=torch.float64)
    inputs["student_IND"] += 1000
    exact_I = reference.relation_rows(**inputs, centre=True)
    rows_I = path.relation_rows(**{name: t.float() for name, t in inputs.items()}, centre=True)
    torch.testing.assert_close(rows_I.double(), exact_I, atol=5e-4, rtol=0)


def test_cached_gram_matrices_stand_for_frozen_heads():
    inputs = make_inputs()
    student_IND = inputs["student_IND"].requires_grad_()
    features = {"student_IND": student_IND, "teacher_IME": inputs["teacher_IME"]}
    grams = {
        "student_gram_DD": head_gram(inputs["student_head_VD"]),
        "teacher_gram_EE": head_gram(inputs["teacher_head_UE"]),
    }
    results = [relation.relation_rows(**inputs), relation.relation_rows(**features, **grams)]
    assert torch.equal(*results)
    assert torch.equal(*(torch.autograd.grad(rows_I.sum(), student_IND)[0] for rows_I in results))


def test_cached_gram_matrix_of_a_trainable_head_is_refused():
    inputs = make_inputs()
    gram_DD = head_gram(inputs["student_head_VD"])
    inputs["student_head_VD"].requires_grad_()
    with pytest.raises(ValueError, match="no gradient to a trainable head"):
        relation.relation_rows(**inputs, student_gram_DD=gram_DD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gram_matrix_is_fp32_and_exact_for_a_head_larger_than_a_block(dtype: torch.dtype):
    head_VD = torch.randn(gemm.HEAD_ROWS_AT_A_TIME + 5, D, generator=torch.Generator().manual_seed(0)).to(
        dtype
    )
    gram_DD = head_gram(head_VD)
    assert gram_DD.dtype == torch.float32
    torch.testing.assert_close(gram_DD.double(), head_VD.double().T @ head_VD.double(), rtol=1e-5, atol=1e-2)


def test_teacher_receives_no_gradient():
    inputs = {name: t.requires_grad_() for name, t in make_inputs().items()}
    relation.relation_rows(**inputs).sum().backward()
    assert inputs["student_head_VD"].grad is not None
    assert inputs["teacher_IME"].grad is None
    assert inputs["teacher_head_UE"].grad is None


def test_head_may_be_taken_away_between_forward_and_backward():
    """As a sharding engine does that gathers parameters for the forward."""
    inputs = make_inputs()
    expected = rows_and_gradients(relation, inputs)[2]
    head = torch.nn.Parameter(inputs["student_head_VD"].detach().clone())
    rows_I = relation.relation_rows(**(inputs | {"student_head_VD": head}))
    head.data = torch.full_like(head.data, torch.nan)
    rows_I.backward(1.7 * torch.arange(1, IMAGES + 1, dtype=torch.float32))
    torch.testing.assert_close(head.grad, expected)


@BOTH
def test_autocast_does_not_change_the_rows(path: ModuleType):
    inputs = make_inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside_I = path.relation_rows(**inputs)
    assert torch.equal(inside_I, path.relation_rows(**inputs))


@pytest.mark.parametrize("centre", [False, True])
def test_products_on_cuda_agree_in_dtype(centre: bool):
    """Shapes and dtypes of the CUDA branch, traced without a device."""
    if not centre:
        needs_mixed_products()
    with FakeTensorMode():
        inputs = {k: torch.empty_like(v, device="cuda") for k, v in make_inputs(dtype=torch.bfloat16).items()}
        inputs["student_head_VD"].requires_grad_()
        rows_I = relation.relation_rows(**inputs, centre=centre)
        head_VD, matrix_DD = inputs["student_head_VD"].detach(), torch.empty(D, D, device="cuda")
        gradients = [gemm.head_times(head_VD, matrix_DD, dtype) for dtype in (torch.bfloat16, torch.float32)]
    assert (rows_I.dtype, rows_I.shape) == (torch.float32, (IMAGES,))
    assert [gradient_VD.dtype for gradient_VD in gradients] == [torch.bfloat16, torch.float32]


@BOTH
def test_no_images_give_no_rows_that_are_joined_to_the_graph(path: ModuleType):
    inputs = make_inputs(images=0)
    rows_I = path.relation_rows(**{name: t.requires_grad_() for name, t in inputs.items()})
    assert rows_I.shape == (0,)
    gradients = torch.autograd.grad(rows_I.sum(), [inputs["student_IND"], inputs["student_head_VD"]])
    assert gradients[1].count_nonzero() == 0


@BOTH
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["student_IND", "teacher_IME"])
@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
def test_bad_feature_makes_its_row_nan(
    path: ModuleType, bad: float, side: str, centre: bool, normalise: bool
):
    inputs = make_inputs()
    inputs[side][1, 2, 3] = bad
    rows_I, gradient_IND, gradient_VD = rows_and_gradients(path, inputs, centre=centre, normalise=normalise)
    assert rows_I.isnan().tolist() == [False, True, False]
    assert gradient_IND[1].isnan().any()
    assert gradient_VD.isnan().any()


@BOTH
@pytest.mark.parametrize("normalise", [False, True])
def test_all_zero_image_gives_one_and_no_gradient(path: ModuleType, normalise: bool):
    inputs = make_inputs()
    inputs["student_IND"][1] = 0
    rows_I, gradient_IND, gradient_VD = rows_and_gradients(path, inputs, normalise=normalise)
    assert float(rows_I[1]) == pytest.approx(1)
    assert gradient_IND[1].count_nonzero() == 0
    assert gradient_VD.isfinite().all()


@BOTH
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_IME": torch.zeros(IMAGES, N + 1, E)}, r"student \[3, 11, 16\], teacher \[3, 12, 24\]"),
        ({"teacher_IME": torch.zeros(IMAGES + 1, N, E)}, "the same tokens of the same images"),
        ({"student_IND": torch.zeros(N, D)}, "the same tokens of the same images"),
        ({"teacher_head_UE": None}, "give both heads to compare logits, or neither"),
        ({"student_head_VD": torch.zeros(V, D + 1)}, "student features and head must agree in width"),
    ],
    ids=str,
)
def test_bad_argument_is_refused_with_what_came(path: ModuleType, change: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        path.relation_rows(**(make_inputs() | change))
