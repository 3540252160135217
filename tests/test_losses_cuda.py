"""The CUDA path of the losses against the reference: cuBLAS products, Triton rows, no host synchronisation.

Run on a machine with a GPU: python -m pytest -m gpu tests/test_losses_cuda.py
Shape legend: N rows, V student vocabulary, D student width.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from loss_inputs import LEAVES, Inputs, assert_same, make_inputs, result_and_gradients, run

from llava_kd.losses import head_loss as fast
from llava_kd.losses import reference, relation
from llava_kd.losses.divergence import KINDS, Divergence, Kind, Temperature
from llava_kd.losses.relation import head_gram

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_cuda(inputs: Inputs) -> Inputs:
    return {name: t.cuda() for name, t in inputs.items()}


def large_inputs(dtype: torch.dtype) -> Inputs:
    """A vocabulary of several blocks whose rows are a multiple of 16, several chunks of rows."""
    inputs = make_inputs(rows=700, student=5008, teacher=5024, dtype=dtype)
    return on_cuda({name: t / 2 if t.ndim == 2 else t for name, t in inputs.items()})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0, "std"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-3), (torch.float32, 1e-4)])
def test_fast_equals_reference(kind: Kind, temperature: Temperature, dtype: torch.dtype, tolerance: float):
    inputs = large_inputs(dtype)
    options = {"divergence": Divergence(kind, 0.3), "temperature": temperature, "num_common": 5001}
    expected = result_and_gradients(reference, inputs, **options)
    actual = result_and_gradients(fast, inputs, chunk_rows=128, **options)
    assert_same(actual, expected, tolerance=tolerance)


def test_losses_of_bf16_inputs_are_fp32_exact():
    inputs = large_inputs(torch.bfloat16)
    exact = run(reference, {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()})
    result = run(fast, inputs)
    torch.testing.assert_close(result.ce_N.double(), exact.ce_N, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.kl_N.double(), exact.kl_N, rtol=1e-4, atol=1e-5)


def test_fp16_logits_agree_with_fp32_ones_to_their_precision():
    inputs = large_inputs(torch.bfloat16)
    exact = result_and_gradients(fast, inputs)
    assert_same(result_and_gradients(fast, inputs, logits_dtype=torch.float16), exact, tolerance=1e-2)


def test_overflowing_fp16_logit_makes_the_loss_nan():
    inputs = large_inputs(torch.bfloat16)
    inputs["student_ND"][0], inputs["student_head_VD"][40] = 1000, -100
    assert run(fast, inputs).loss.isfinite()
    assert run(fast, inputs, logits_dtype=torch.float16).loss.isnan()


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_autocast_reads_the_products_in_its_dtype(weights: torch.dtype):
    inputs = large_inputs(torch.bfloat16)
    inputs = {name: t.to(weights) if t.ndim == 2 else t for name, t in inputs.items()}
    with torch.autocast("cuda", dtype=torch.bfloat16):
        inside = result_and_gradients(fast, inputs)
    expected = result_and_gradients(reference, inputs)
    assert inside["student_head_VD"].dtype == weights
    assert_same(inside, expected, tolerance=4e-3)


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_stated_row_counts_spare_every_host_synchronisation(request: pytest.FixtureRequest):
    inputs = large_inputs(torch.bfloat16)
    has_kl_N, has_ce_N = inputs["kl_weight_N"] != 0, inputs["ce_weight_N"] != 0
    counts = (int(has_kl_N.sum()), int((has_ce_N & ~has_kl_N).sum()))
    leaves = {name: inputs[name].requires_grad_() for name in LEAVES}
    run(fast, inputs | leaves, active_rows=counts).loss.backward()  # compiles
    request.getfixturevalue("no_synchronisation")
    result = run(fast, inputs | leaves, active_rows=counts)
    result.loss.backward()
    torch.cuda.set_sync_debug_mode("default")
    assert result.loss.isfinite()
    assert run(fast, inputs, active_rows=(counts[0] - 1, counts[1])).loss.isnan()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", ["student_ND", "teacher_NE"])
def test_bad_hidden_state_makes_loss_and_gradient_nan(bad: float, side: str):
    inputs = large_inputs(torch.bfloat16)
    inputs[side][1, 3] = bad
    result = result_and_gradients(fast, inputs)
    assert result["loss"].isnan()
    assert result["kl_N"].isnan().nonzero().flatten().tolist() == [1]
    assert result["student_ND"][1].isnan().any()


def test_target_outside_the_vocabulary_makes_the_loss_nan():
    inputs = large_inputs(torch.bfloat16)
    inputs["targets_N"][0] = 5008
    assert run(fast, inputs).loss.isnan()


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gram_form_of_the_relation_equals_the_reference(dtype: torch.dtype, centre: bool):
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    features = (normal(3, 81, 64).requires_grad_(), normal(3, 81, 96))
    heads = {"student_head_VD": normal(5008, 64).requires_grad_(), "teacher_head_UE": normal(5024, 96)}
    leaves = [features[0], heads["student_head_VD"]]
    expected_I = reference.relation_rows(*features, **heads, centre=centre)
    gram_EE = head_gram(heads["teacher_head_UE"])
    actual_I = relation.relation_rows(*features, **heads, centre=centre, teacher_gram_EE=gram_EE)
    torch.testing.assert_close(actual_I, expected_I, rtol=1e-4, atol=1e-5)
    pairs = zip(
        torch.autograd.grad(actual_I.sum(), leaves),
        torch.autograd.grad(expected_I.sum(), leaves),
        strict=True,
    )
    for got, want in pairs:
        assert (got.double() - want.double()).norm() <= 5e-3 * want.double().norm()
