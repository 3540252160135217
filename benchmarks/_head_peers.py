"""Other projects' ways to compute the problem of the head loss benchmark, where they are installed.

Their functions take one mask for both terms, so cross-entropy over the response rows is a call of its own.
They know one vocabulary only.

    pip install liger-kernel==0.8.5 fla-core==0.6.0 orda-kernel==0.1.0
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from _head_losses import Case, Loss
from torch import Tensor
from torch.nn import functional as F


def peer_losses(device: str) -> dict[str, Loss]:
    """What can be imported and runs on this device."""
    losses: dict[str, Loss] = {}
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ImportError:
        pass
    else:
        for name, compiled in (("eager", False), ("compiled", True)):
            if compiled and device == "cpu":
                continue  # minutes of compilation
            weights = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "beta": 0.0}
            chunked = LigerFusedLinearJSDLoss(**weights, compiled=compiled)
            losses[f"liger chunked JSD, {name}"] = _liger_chunked(chunked)
    if device == "cpu":
        return losses  # the rest are GPU kernels
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD
    except ImportError:
        pass
    else:
        losses["liger fused JSD"] = _liger_fused(
            LigerFusedLinearJSD(jsd_beta=0.0), LigerFusedLinearCrossEntropyLoss()
        )
    try:
        from fla.modules.fused_kl_div import FusedKLDivLoss
    except ImportError:
        pass
    else:
        losses["fla KL, fp32 dW"] = _fla(FusedKLDivLoss(accumulate_grad_in_fp32=True))
        losses["fla KL, bf16 dW"] = _fla(FusedKLDivLoss(accumulate_grad_in_fp32=False))
    try:
        from orda_kernel import SeparateTeacher, distillation_loss
    except ImportError:
        pass
    else:
        losses["orda fast"] = _orda(distillation_loss, SeparateTeacher, "fast")
        losses["orda balanced"] = _orda(distillation_loss, SeparateTeacher, "balanced")
    return losses


def _response(case: Case) -> tuple[Tensor, Tensor]:
    return case.student_ND[-case.num_response :], case.targets_N[-case.num_response :]


def _liger_chunked(module: Callable[..., Tensor]) -> Loss:
    def loss(case: Case) -> Tensor:
        every = torch.zeros_like(case.targets_N)  # no row is ignored
        total = module(case.student_ND, case.student_head_VD, case.teacher_NE, case.teacher_head_UE, every)
        if case.num_response:
            rows_ND, targets_N = _response(case)
            total = total + F.cross_entropy((rows_ND @ case.student_head_VD.T).float(), targets_N)
        return total

    return loss


def _liger_fused(kl: Callable[..., Tensor], cross_entropy: Callable[..., Tensor]) -> Loss:
    def loss(case: Case) -> Tensor:
        total = kl(case.student_ND, case.student_head_VD, case.teacher_NE, case.teacher_head_UE, None)
        if case.num_response:
            rows_ND, targets_N = _response(case)
            total = total + cross_entropy(case.student_head_VD, rows_ND, targets_N)
        return total

    return loss


def _fla(kl: Callable[..., Tensor]) -> Loss:
    def loss(case: Case) -> Tensor:
        total = kl(case.student_ND, case.teacher_NE, case.student_head_VD, case.teacher_head_UE)
        if case.num_response:
            rows_ND, targets_N = _response(case)
            total = total + F.cross_entropy((rows_ND @ case.student_head_VD.T).float(), targets_N)
        return total

    return loss


def _orda(call: Callable[..., object], teacher: Callable[..., object], profile: str) -> Loss:
    def loss(case: Case) -> Tensor:
        side = teacher(hidden=case.teacher_NE, weight=case.teacher_head_UE)
        every = torch.zeros_like(case.targets_N)
        total = call(
            case.student_ND, case.student_head_VD, every, side,
            student_ce_weight=0.0, kl_weight=1.0, profile=profile,
        ).loss  # pyright: ignore[reportAttributeAccessIssue]  # fmt: skip
        if case.num_response:
            rows_ND, targets_N = _response(case)
            total = total + F.cross_entropy((rows_ND @ case.student_head_VD.T).float(), targets_N)
        return total

    return loss
