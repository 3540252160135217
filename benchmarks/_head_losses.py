"""The problem of the head loss benchmark, and ways to compute it that need no other project.

Every way maps a `Case` to a scalar: the mean KL(teacher || student) over all rows, and with response rows,
which are the last ones, the mean cross-entropy over those.

Shape legend: N rows, V student vocabulary, U teacher vocabulary, D student width, E teacher width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from llava_kd.losses.head_loss import head_loss

RECOMPUTE_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem. `num_response` rows at the end have targets; 0 means KL alone."""

    student_ND: Tensor
    student_head_VD: Tensor
    teacher_NE: Tensor
    teacher_head_UE: Tensor
    targets_N: Tensor
    num_response: int
    num_common: int

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in (self.student_ND, self.student_head_VD) if t.requires_grad]

    @property
    def has_one_vocabulary(self) -> bool:
        return len(self.student_head_VD) == len(self.teacher_head_UE) == self.num_common


Loss = Callable[[Case], Tensor]


def make_case(
    *,
    rows: int,
    widths: tuple[int, int],
    vocabularies: tuple[int, int],
    dtype: torch.dtype,
    device: str,
    num_response: int = 0,
    num_common: int | None = None,
    frozen_head: bool = False,
) -> Case:
    """Random rows and heads whose logits have a standard deviation of 3.2, as LLM logits do."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows: int, width: int, deviation: float) -> Tensor:
        return (deviation * torch.randn(rows, width, generator=generator, device=device)).to(dtype)

    targets_N = torch.randint(0, min(vocabularies), (rows,), generator=generator, device=device)
    targets_N[: rows - num_response] = -100
    return Case(
        student_ND=normal(rows, widths[0], 1.0).requires_grad_(),
        student_head_VD=normal(vocabularies[0], widths[0], 3.2 / widths[0] ** 0.5).requires_grad_(
            not frozen_head
        ),
        teacher_NE=normal(rows, widths[1], 1.0),
        teacher_head_UE=normal(vocabularies[1], widths[1], 3.2 / widths[1] ** 0.5),
        targets_N=targets_N,
        num_response=num_response,
        num_common=num_common or min(vocabularies),
    )


def ours(*, logits_dtype: torch.dtype = torch.float32, chunk_rows: int | None = None) -> Loss:
    """llava_kd.losses.head_loss, told how many rows have a weight, as the training loop tells it."""

    def loss(case: Case) -> Tensor:
        rows = len(case.student_ND)
        ce_weight_N = (case.targets_N >= 0) / max(case.num_response, 1)
        return head_loss(
            case.student_ND, case.student_head_VD, case.targets_N, ce_weight_N=ce_weight_N,
            teacher_NE=case.teacher_NE, teacher_head_UE=case.teacher_head_UE,
            kl_weight_N=torch.full_like(ce_weight_N, 1 / rows), num_common=case.num_common,
            logits_dtype=logits_dtype, chunk_rows=chunk_rows, active_rows=(rows, 0),
        ).loss  # fmt: skip

    return loss


def naive(case: Case) -> Tensor:
    """Logits of all rows, log-softmax in fp32: the loop that most people write."""
    logits_NV = case.student_ND @ case.student_head_VD.T
    loss = _kl_sum(logits_NV, case.teacher_NE, case) / len(case.student_ND)
    if case.num_response:
        response = slice(-case.num_response, None)
        loss = loss + F.cross_entropy(logits_NV[response].float(), case.targets_N[response])
    return loss


def recompute(case: Case) -> Tensor:
    """Chunks under activation checkpointing: the backward computes the logits a second time."""

    def kl(student_ND: Tensor, head_VD: Tensor, teacher_NE: Tensor) -> Tensor:
        return _kl_sum(student_ND @ head_VD.T, teacher_NE, case)

    def cross_entropy(student_ND: Tensor, head_VD: Tensor, targets_N: Tensor) -> Tensor:
        return F.cross_entropy((student_ND @ head_VD.T).float(), targets_N, reduction="sum")

    def total(term: Callable[..., Tensor], student_ND: Tensor, other: Tensor) -> Tensor:
        pairs = zip(student_ND.split(RECOMPUTE_ROWS), other.split(RECOMPUTE_ROWS), strict=True)
        sums = [checkpoint(term, s, case.student_head_VD, o, use_reentrant=False) for s, o in pairs]
        return torch.stack(sums).sum()

    loss = total(kl, case.student_ND, case.teacher_NE) / len(case.student_ND)
    if case.num_response:
        rows_ND, targets_N = case.student_ND[-case.num_response :], case.targets_N[-case.num_response :]
        loss = loss + total(cross_entropy, rows_ND, targets_N) / case.num_response
    return loss


def _kl_sum(logits_NV: Tensor, teacher_NE: Tensor, case: Case) -> Tensor:
    with torch.no_grad():
        log_q_NC = (teacher_NE @ case.teacher_head_UE.T)[:, : case.num_common].float().log_softmax(1)
    log_p_NC = logits_NV[:, : case.num_common].float().log_softmax(1)
    return F.kl_div(log_p_NC, log_q_NC, reduction="sum", log_target=True)


def gemms(case: Case) -> None:
    """The four matrix products alone, three where the head is frozen: the floor. Returns nothing."""
    student_ND, head_VD = case.student_ND.detach(), case.student_head_VD.detach()
    dz_NV = student_ND @ head_VD.T
    _ = case.teacher_NE @ case.teacher_head_UE.T
    _ = dz_NV @ head_VD
    if case.student_head_VD.requires_grad:
        _ = dz_NV.T @ student_ND


def plain_losses(device: str) -> dict[str, Loss]:
    """What needs no other project."""
    return {
        "ours, fp32 logits": ours(),
        **({"ours, fp16 logits": ours(logits_dtype=torch.float16)} if device == "cuda" else {}),
        "naive PyTorch": naive,
        "naive PyTorch, compiled": torch.compile(naive),
        f"recompute, {RECOMPUTE_ROWS} rows": recompute,
    }
