"""The fast head loss against the reference, alone and inside engines.

Shape legend: N rows, V student vocabulary, U teacher vocabulary, D student width, E teacher width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from loss_inputs import (
    LEAVES,
    D,
    Inputs,
    assert_same,
    make_inputs,
    needs_mixed_products,
    result_and_gradients,
    run,
)
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from llava_kd.losses import head_loss as fast
from llava_kd.losses import reference
from llava_kd.losses.divergence import FORWARD, KINDS, Divergence, Kind, Temperature
from llava_kd.losses.kernels import gemm
from llava_kd.losses.kernels.row_torch import torch_rows
from llava_kd.losses.kernels.rows import MAX_CHUNK_ROWS, chunk_size

BOTH = pytest.mark.parametrize("path", [reference, fast], ids=["reference", "fast"])
TEACHER = ("teacher_NE", "teacher_head_UE", "teacher_bias_U")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("rows", [0, 1, 13, 64])
@pytest.mark.parametrize("chunk_rows", [1, 5, 1000, None])
def test_fast_equals_reference_for_every_dtype_size_and_chunk(
    dtype: torch.dtype, rows: int, chunk_rows: int | None
):
    inputs = make_inputs(rows=rows, dtype=dtype)
    expected = result_and_gradients(reference, inputs)
    actual = result_and_gradients(fast, inputs, chunk_rows=chunk_rows)
    assert_same(actual, expected, tolerance=TOLERANCE[dtype])


def test_sums_over_a_whole_vocabulary_lose_nothing() -> None:
    """PyTorch's softmaxes add 150 thousand exponentials one after the other, which moves them by 1e-5."""
    generator = torch.Generator().manual_seed(0)
    student_NV, teacher_NV = 3.2 * torch.randn(2, 3, 151936, generator=generator)
    weight_N = torch.tensor([1.0, 0.5, 2.0])
    gradient_NV = torch.empty_like(student_NV)
    _, kl_N = torch_rows(
        student_NV, teacher_NV, targets_C=torch.full((3,), -100), ce_weight_C=torch.zeros(3),
        kl_weight_C=weight_N, student_bias_V=None, teacher_bias_U=None, temperature=1.0,
        divergence=FORWARD, num_common=151936, gradient_CV=gradient_NV,
    )  # fmt: skip
    s_NV, t_NV = student_NV.double(), teacher_NV.double()
    p_s_NV, p_t_NV = s_NV.softmax(1), t_NV.softmax(1)
    exact_N = (p_t_NV * (t_NV.log_softmax(1) - s_NV.log_softmax(1))).sum(1)
    exact_NV = weight_N.unsqueeze(1) * (p_s_NV - p_t_NV)
    assert (kl_N - exact_N).abs().max() < 1e-5
    assert (gradient_NV - exact_NV).norm() < 5e-7 * exact_NV.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0, "std"])
@pytest.mark.parametrize(
    ("student", "teacher", "common"),
    [(70, 70, 70), (70, 90, 70), (70, 90, 61), (90, 70, 70), (90, 70, 1)],
    ids=["same", "wider teacher", "wider teacher, padded", "wider student", "one column"],
)
def test_fast_equals_reference_for_every_divergence_temperature_and_vocabulary(
    kind: Kind, temperature: Temperature, student: int, teacher: int, common: int
):
    inputs = make_inputs(student=student, teacher=teacher)
    options = {"divergence": Divergence(kind, 0.3), "temperature": temperature, "num_common": common}
    expected = result_and_gradients(reference, inputs, **options)
    actual = result_and_gradients(fast, inputs, chunk_rows=4, **options)
    assert_same(actual, expected, tolerance=5e-6)


def test_fast_equals_reference_where_the_head_is_larger_than_a_block():
    inputs = make_inputs(rows=3, student=9000, teacher=9000, dtype=torch.bfloat16)
    expected = result_and_gradients(reference, inputs, num_common=8999)
    assert_same(result_and_gradients(fast, inputs, num_common=8999), expected, tolerance=2e-3)


@BOTH
def test_loss_without_teacher_is_the_cross_entropy_of_pytorch(path: ModuleType):
    inputs = {k: v for k, v in make_inputs().items() if "teacher" not in k and "kl" not in k}
    result = run(path, inputs | {"ce_weight_N": (inputs["targets_N"] >= 0).float()}, num_common=None)
    logits_NV = inputs["student_ND"] @ inputs["student_head_VD"].T + inputs["student_bias_V"]
    expected = nn.functional.cross_entropy(logits_NV, inputs["targets_N"], reduction="sum")
    torch.testing.assert_close(result.loss, expected)
    assert result.kl_N.count_nonzero() == 0


@pytest.mark.parametrize("temperature", [1.0, "std"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_divergence_of_equal_models_is_zero_on_the_fast_path(kind: Kind, temperature: Temperature):
    inputs = make_inputs(student=70, teacher=70)
    inputs |= {name: inputs[other] for name, other in zip(TEACHER, LEAVES, strict=True)}
    inputs["ce_weight_N"] = torch.zeros(13)
    result = result_and_gradients(fast, inputs, divergence=Divergence(kind, 0.3), temperature=temperature)
    assert result["kl_N"].count_nonzero() == 0
    assert result["student_ND"].abs().max() <= (1e-5 if kind.startswith("skewed") else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_equal_logits_is_finite_at_the_temperature_std(kind: Kind):
    inputs = make_inputs()
    inputs |= {"student_ND": torch.zeros(13, D), "student_bias_V": torch.zeros(70)}
    options = {"temperature": "std", "divergence": Divergence(kind, 0.3)}
    found = result_and_gradients(fast, inputs, **options)
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert_same(found, result_and_gradients(reference, inputs, **options), tolerance=5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kl_and_gradient_of_equal_models_are_zero_on_the_fast_path(dtype: torch.dtype):
    inputs = make_inputs(student=70, teacher=70, dtype=dtype)
    inputs |= {
        "teacher_NE": inputs["student_ND"],
        "teacher_head_UE": inputs["student_head_VD"],
        "teacher_bias_U": inputs["student_bias_V"],
        "ce_weight_N": torch.zeros(13),
    }
    result = result_and_gradients(fast, inputs)
    assert result["kl_N"].count_nonzero() == 0
    assert result["student_ND"].count_nonzero() == 0


@pytest.mark.parametrize("frozen", [*LEAVES, None])
def test_frozen_inputs_receive_no_gradient_and_change_no_other(frozen: str | None):
    inputs = make_inputs()
    names = [name for name in LEAVES if name != frozen]
    for name in names:
        inputs[name].requires_grad_()
    gradients = [
        torch.autograd.grad(run(path, inputs).loss, [inputs[name] for name in names])
        for path in (fast, reference)
    ]
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_nothing_is_kept_for_a_backward_where_no_gradient_is_wanted():
    inputs = make_inputs()
    with torch.no_grad():
        inputs["student_head_VD"].requires_grad_()
        assert not run(fast, inputs).loss.requires_grad
    assert run(fast, inputs).loss.requires_grad


@BOTH
def test_tied_head_adds_both_gradients(path: ModuleType):
    """The head is also the embedding that the rows come from."""
    inputs = make_inputs(student=70)
    weight_VD = inputs["student_head_VD"].clone().requires_grad_()
    rows_ND = weight_VD[torch.arange(13)] * 2
    run(path, inputs | {"student_ND": rows_ND, "student_head_VD": weight_VD}).loss.backward()
    plain = result_and_gradients(reference, inputs | {"student_ND": rows_ND.detach()})
    expected_VD = plain["student_head_VD"] / 1.7
    expected_VD[:13] += 2 * plain["student_ND"] / 1.7
    torch.testing.assert_close(weight_VD.grad, expected_VD, rtol=1e-5, atol=1e-5)


def test_active_rows_that_are_right_change_nothing_and_wrong_ones_make_nan():
    inputs = make_inputs()
    has_kl_N, has_ce_N = inputs["kl_weight_N"] != 0, inputs["ce_weight_N"] != 0
    counts = (int(has_kl_N.sum()), int((has_ce_N & ~has_kl_N).sum()))
    expected = result_and_gradients(fast, inputs)
    assert_same(result_and_gradients(fast, inputs, active_rows=counts), expected, tolerance=0.0)
    for wrong in ((counts[0] - 1, counts[1]), (counts[0], counts[1] + 1)):
        assert run(fast, inputs, active_rows=wrong).loss.isnan()


def test_rows_without_weight_reach_no_product(monkeypatch: pytest.MonkeyPatch):
    inputs = make_inputs()
    seen: list[int] = []
    write = fast.gemm.write_logits
    monkeypatch.setattr(fast.gemm, "write_logits", lambda h, w, out: (seen.append(len(h)), write(h, w, out)))
    run(fast, inputs)
    has_kl_N, has_ce_N = inputs["kl_weight_N"] != 0, inputs["ce_weight_N"] != 0
    num_kl, num_ce_alone = int(has_kl_N.sum()), int((has_ce_N & ~has_kl_N).sum())
    assert seen == [num_kl, num_kl, num_ce_alone]  # student and teacher of the KL rows, student of the rest


def test_second_backward_is_refused_rather_than_wrong():
    inputs = make_inputs()
    student_ND = inputs["student_ND"].requires_grad_()
    loss = run(fast, inputs).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call head_loss again"):
        torch.autograd.grad(loss, student_ND)


def test_a_compiled_caller_gets_the_same_loss_and_gradient():
    inputs = make_inputs()

    def scaled(**values: Tensor) -> Tensor:
        return run(fast, values | {"student_ND": values["student_ND"] * 2}).loss * 3

    gradients = []
    for call in (scaled, torch.compile(scaled, backend="eager")):
        student_ND = inputs["student_ND"].clone().requires_grad_()
        call(**(inputs | {"student_ND": student_ND})).backward()
        gradients.append(student_ND.grad)
    assert torch.equal(*gradients)


def processor_has_bf16_products() -> bool:
    fine = torch.rand(64, 64)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        gemm.bf16_as_autocast_on_cpu(fine.device),
        torch.autocast("cpu", enabled=False),
    ):
        rounded = fine @ fine
    return not torch.equal(rounded, fine @ fine)


@pytest.fixture
def precision_set_by_device() -> Iterator[None]:
    """After which PyTorch refuses to tell the one precision of all devices."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.usefixtures("precision_set_by_device")
def test_autocast_rounds_operands_and_no_logit_on_a_cpu():
    inputs = make_inputs(rows=64, student=300, teacher=400)
    inputs = {name: t.bfloat16().float() if t.ndim == 2 else t for name, t in inputs.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = result_and_gradients(fast, inputs)
    outside = result_and_gradients(fast, inputs)
    of_losses = [{name: found[name] for name in reference.HeadLoss._fields} for found in (inside, outside)]
    assert_same(*of_losses, tolerance=1e-6)
    assert_same(inside, outside, tolerance=4e-3)
    is_exact = torch.equal(inside["student_ND"], outside["student_ND"])
    assert is_exact != processor_has_bf16_products()  # they round the gradient of the logits


class Student(nn.Module):
    """Rows from a layer and a loss that reads the head's weight, as the objective does inside the student."""

    def __init__(self, inputs: Inputs, path: ModuleType) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(D, D)
        self.lm_head = nn.Linear(D, len(inputs["student_head_VD"]), bias=False)
        self.path = path

    def forward(self, inputs: Inputs) -> Tensor:
        own = {"student_ND": self.body(inputs["student_ND"]), "student_head_VD": self.lm_head.weight}
        return run(self.path, inputs | own).loss


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("wrap", [DistributedDataParallel, fully_shard], ids=["ddp", "fsdp2"])
@pytest.mark.usefixtures("one_rank")
def test_engine_gets_the_gradient_of_the_reference(wrap: Callable[[nn.Module], nn.Module]):
    inputs = make_inputs()
    expected, actual = Student(inputs, reference), Student(inputs, fast)
    expected(inputs).backward()
    wrap(actual)(inputs).backward()
    for want, got in zip(expected.parameters(), actual.parameters(), strict=True):
        gradient = got.grad.full_tensor() if isinstance(got.grad, DTensor) else got.grad
        torch.testing.assert_close(gradient, want.grad, rtol=1e-5, atol=1e-6)


def test_weight_is_not_needed_after_the_forward():
    """An engine that gathers parameters for the forward may take them away before the backward."""
    inputs = make_inputs()
    expected, actual = Student(inputs, reference), Student(inputs, fast)
    expected(inputs).backward()
    loss, weight = actual(inputs), actual.lm_head.weight
    whole_VD, weight.data = weight.data, torch.full_like(weight.data, torch.nan)
    loss.backward()
    weight.data = whole_VD
    torch.testing.assert_close(weight.grad, expected.lm_head.weight.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(actual.body.weight.grad, expected.body.weight.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("memory_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.float16])
def test_products_on_cuda_agree_in_dtype(
    memory_dtype: torch.dtype, logits_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    """Shapes and dtypes of the CUDA branch, traced without a device."""
    if memory_dtype != torch.float32:
        needs_mixed_products()
    seen = set()

    def rows(student_CV: Tensor, teacher_CU: Tensor | None, *, gradient_CV: Tensor, **_: object):
        seen.add((student_CV.dtype, gradient_CV.dtype))
        return student_CV.new_zeros((2, len(student_CV)), dtype=torch.float32)

    monkeypatch.setattr(fast, "triton_rows", rows)
    with FakeTensorMode():
        inputs = {k: torch.empty_like(v, device="cuda") for k, v in make_inputs(dtype=memory_dtype).items()}
        inputs["student_head_VD"].requires_grad_()
        loss = run(fast, inputs, chunk_rows=4, active_rows=(7, 3), logits_dtype=logits_dtype).loss
    assert loss.dtype == torch.float32
    assert seen == {(logits_dtype, torch.float32 if memory_dtype == torch.float32 else torch.bfloat16)}


def test_chunks_are_equal_and_do_not_depend_on_the_vocabulary_over_the_width():
    cpu = torch.device("cpu")
    assert chunk_size(9000, bytes_per_row=1, device=cpu) == 3000
    assert chunk_size(MAX_CHUNK_ROWS + 1, bytes_per_row=1, device=cpu) == 2120
    assert chunk_size(793, bytes_per_row=4 * 2 * 151936, device=cpu) == 200
    assert chunk_size(5, bytes_per_row=2**40, device=cpu) == 8
