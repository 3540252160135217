"""Runs the Triton row kernels in Triton's interpreter on a CPU and prints how far they are from the oracle.

A program of its own, started by test_losses_row_kernel.py: whether Triton interprets is settled when the
kernels are imported. The oracle is the reference in fp64 with the identity as head, so that rows are logits.

Shape legend: N rows, V student vocabulary, U teacher vocabulary.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from itertools import product

os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

import torch
from loss_inputs import LEAVES, make_inputs, result_and_gradients
from torch import Tensor

from llava_kd.losses import head_loss as fast
from llava_kd.losses import reference, reference_top_k, top_k
from llava_kd.losses.divergence import KINDS, WHOLE_KINDS, Divergence, Temperature, divergence_rows
from llava_kd.losses.kernels import row_triton
from llava_kd.losses.reference_top_k import TopK

ROWS, WIDTH = 8, 150


def errors(
    *,
    kind: str = "forward",
    temperature: Temperature = 1.0,
    teacher: int = WIDTH,
    common: int = WIDTH,
    scale: float = 3.0,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    gradient_dtype: torch.dtype = torch.float32,
    in_place: bool = False,
    without_teacher: bool = False,
) -> dict[str, float]:
    """Largest error of the losses and relative error of the gradient, over rows with all kinds of weight."""
    generator = torch.Generator().manual_seed(0)
    student_NV = (scale * torch.randn(ROWS, WIDTH, generator=generator)).to(dtype)
    teacher_NU = (scale * torch.randn(ROWS, teacher, generator=generator)).to(dtype)
    biases = (torch.randn(WIDTH, generator=generator), torch.randn(teacher, generator=generator))
    weights = torch.rand(2, ROWS, generator=generator)
    weights[0, 1::2], weights[1, 2::4], weights[1, 3::4] = 0, 0, 0
    targets_N = torch.randint(0, WIDTH, (ROWS,), generator=generator)
    targets_N[1::2] = -100
    divergence = Divergence(kind, 0.3)  # pyright: ignore[reportArgumentType]

    leaf_NV = student_NV.double().requires_grad_()
    teacher_arguments = {
        "teacher_NE": teacher_NU.double(),
        "teacher_head_UE": torch.eye(teacher).double(),
        "kl_weight_N": weights[1].double(),
        "num_common": common,
    }
    want = reference.head_loss(
        leaf_NV, torch.eye(WIDTH).double(), targets_N, ce_weight_N=weights[0].double(),
        student_bias_V=biases[0].double() if bias else None,
        temperature=temperature, divergence=divergence,
        **({} if without_teacher else teacher_arguments),
        **({"teacher_bias_U": biases[1].double()} if bias and not without_teacher else {}),
    )  # fmt: skip
    want.loss.backward()
    gradient_NV = (
        student_NV.view(gradient_dtype) if in_place else torch.full_like(student_NV, 7, dtype=gradient_dtype)
    )
    ce_N, kl_N = row_triton.triton_rows(
        student_NV, None if without_teacher else teacher_NU, targets_C=targets_N, ce_weight_C=weights[0],
        kl_weight_C=None if without_teacher else weights[1], student_bias_V=biases[0] if bias else None,
        teacher_bias_U=biases[1] if bias and not without_teacher else None, temperature=temperature,
        divergence=divergence, num_common=common, gradient_CV=gradient_NV,
    )  # fmt: skip
    assert leaf_NV.grad is not None
    return {
        "ce": distance(ce_N, want.ce_N),
        "kl": distance(kl_N, want.kl_N),
        "gradient": float((gradient_NV.double() - leaf_NV.grad).norm() / leaf_NV.grad.norm()),
    }


def distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).abs().max())


def cases() -> Iterator[tuple[str, dict[str, float]]]:
    for kind in KINDS:
        yield f"{kind} T=2 padded vocabulary", errors(kind=kind, temperature=2.0, teacher=170, common=101)
        yield f"{kind} T=1 same vocabulary", errors(kind=kind)
        yield f"{kind} bf16 gradient", errors(kind=kind, gradient_dtype=torch.bfloat16)
        yield (
            f"{kind} T=std padded vocabulary",
            errors(kind=kind, temperature="std", teacher=170, common=101, bias=True),
        )
    yield "adaptive, flat", errors(kind="adaptive", scale=0.1)
    yield "adaptive, peaked", errors(kind="adaptive", scale=9.0)
    yield "one common column, T=std", errors(temperature="std", common=1)
    yield "wider student with bias", errors(teacher=130, common=130, bias=True)
    yield "wider student with bias, jsd", errors(teacher=130, common=130, bias=True, kind="jsd")
    yield "cross-entropy alone", errors(without_teacher=True)
    yield "large logits", errors(scale=30.0)
    yield "large logits, reverse", errors(scale=30.0, kind="reverse")
    yield "gradient over fp32 logits", errors(in_place=True)
    fp16 = {"dtype": torch.float16, "gradient_dtype": torch.bfloat16}
    yield "fp16 logits, bf16 gradient over them", errors(**fp16, in_place=True)


def bad_rows() -> dict[str, list[bool]]:
    """Which losses, and which rows of the gradient, are NaN where row 1 of one side holds something bad."""
    found = {}
    for side in ("student", "teacher"):
        for bad in (math.nan, math.inf, -math.inf):
            logits = {"student": torch.randn(4, WIDTH), "teacher": torch.randn(4, WIDTH)}
            logits[side][1, 100] = bad
            gradient_NV = torch.empty(4, WIDTH)
            ce_N, kl_N = row_triton.triton_rows(
                logits["student"], logits["teacher"], targets_C=torch.tensor([0, 1, 2, 200]),
                ce_weight_C=torch.tensor([0.0, 1.0, 1.0, 0.0]), kl_weight_C=torch.ones(4),
                student_bias_V=None, teacher_bias_U=None, temperature=1.0, divergence=Divergence(),
                num_common=WIDTH, gradient_CV=gradient_NV,
            )  # fmt: skip
            found[f"{side} {bad}"] = [t.isnan().tolist() for t in (ce_N, kl_N, gradient_NV.sum(1))]
    return found


def bad_target() -> list[bool]:
    """Whether the loss is NaN for a target in the vocabulary, beyond it, and negative."""
    ce_N, _ = row_triton.triton_rows(
        torch.randn(3, WIDTH), None, targets_C=torch.tensor([0, WIDTH, -100]), ce_weight_C=torch.ones(3),
        kl_weight_C=None, student_bias_V=None, teacher_bias_U=None, temperature=1.0, divergence=Divergence(),
        num_common=0, gradient_CV=torch.empty(3, WIDTH),
    )  # fmt: skip
    return ce_N.isnan().tolist()


def equal_models() -> dict[str, list[float]]:
    """Largest divergence and largest gradient between equal logits."""
    largest = {}
    for kind, temperature in product(KINDS, (1.0, "std")):
        logits_NV, gradient_NV = 5 * torch.randn(4, WIDTH), torch.empty(4, WIDTH)
        _, kl_N = row_triton.triton_rows(
            logits_NV, logits_NV.clone(), targets_C=torch.zeros(4, dtype=torch.long),
            ce_weight_C=torch.zeros(4), kl_weight_C=torch.ones(4), student_bias_V=None, teacher_bias_U=None,
            temperature=temperature, divergence=Divergence(kind, 0.3), num_common=WIDTH,
            gradient_CV=gradient_NV,
        )  # fmt: skip
        largest[f"{kind} T={temperature}"] = [float(kl_N.abs().max()), float(gradient_NV.abs().max())]
    return largest


def biases() -> dict[str, list[float]]:
    """Mean error of small divergences of the mixtures, and their exact mean, in nats a row."""
    found = {}
    student_NV = 3 * torch.randn(16, 400)
    teacher_NV = student_NV + 1e-3 * torch.randn(16, 400)
    for kind in ("jsd", "skewed_forward", "skewed_reverse"):
        divergence = Divergence(kind, 0.3)  # pyright: ignore[reportArgumentType]
        exact_N = divergence_rows(
            student_NV.double().log_softmax(1), teacher_NV.double().log_softmax(1), divergence
        )
        _, kl_N = row_triton.triton_rows(
            student_NV, teacher_NV, targets_C=torch.zeros(16, dtype=torch.long), ce_weight_C=torch.zeros(16),
            kl_weight_C=torch.ones(16), student_bias_V=None, teacher_bias_U=None, temperature=1.0,
            divergence=divergence, num_common=400, gradient_CV=None,
        )  # fmt: skip
        found[kind] = [float((kl_N.double() - exact_N).mean()), float(exact_N.mean())]
    return found


def whole_head_loss(temperature: Temperature) -> float:
    """Largest relative error of the head loss with these kernels in place of the PyTorch rows."""
    inputs = make_inputs()
    got = result_and_gradients(fast, inputs, chunk_rows=4, temperature=temperature)
    want = result_and_gradients(reference, inputs, temperature=temperature)
    return max(float((got[name] - want[name]).detach().norm() / want[name].detach().norm()) for name in want)


def whole_top_k(kind: str, temperature: Temperature) -> float:
    """The same of the head loss against the largest logits."""
    inputs = make_inputs(teacher=65)
    logits_NC = inputs["teacher_NE"] @ inputs["teacher_head_UE"].T + inputs["teacher_bias_U"]
    top_NK, columns_NK = logits_NC.topk(6, dim=1)
    std_N = logits_NC.std(1) if isinstance(temperature, str) else None
    others_NC = logits_NC.scatter(1, columns_NK, -torch.inf)
    others_NC = others_NC / (temperature if std_N is None else std_N.unsqueeze(1))
    top = TopK(logits_NK=top_NK, columns_NK=columns_NK, rest_N=others_NC.logsumexp(1), std_N=std_N)
    options = {"top": top, "num_common": 65, "temperature": temperature, "divergence": Divergence(kind, 0.3)}
    results = []
    for path in (top_k, reference_top_k):
        given = {name: tensor for name, tensor in inputs.items() if not name.startswith("teacher")}
        leaves = {name: given[name].clone().requires_grad_() for name in LEAVES}
        found = path.top_k_head_loss(**given | leaves, **options)
        results.append([found.kl_N, *torch.autograd.grad(found.loss, list(leaves.values()))])
    return max(float((got - want).norm() / want.norm()) for got, want in zip(*results, strict=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    fast.torch_rows = row_triton.triton_rows
    row_triton.BLOCK = 64  # three blocks a row, the last one ragged
    results = {
        "errors": dict(cases()),
        "bad_rows": bad_rows(),
        "bad_target": bad_target(),
        "equal_models": equal_models(),
        "biases": biases(),
        "whole_head_loss": {str(t): whole_head_loss(t) for t in (2.0, "std")},
        "whole_top_k": {
            f"{kind} T={t}": whole_top_k(kind, t)
            for kind, t in product(KINDS, (2.0, "std"))
            if kind not in WHOLE_KINDS
        },
    }
    print(json.dumps(results))
