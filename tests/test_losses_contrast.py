"""One target in place of two: the gradients of both divergences, taken by autograd, and rows that stay.

Shape legend: N rows, M response rows, V columns of the student, U of the teacher, D width.
"""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from llava_kd.distill.formulas import FORMULAS
from llava_kd.losses.divergence import Divergence
from llava_kd.losses.targets.contrast import ContrastTarget
from llava_kd.losses.targets.mixture import Voice

COMMON, GAMMA, T = 9, 2.0, 2.0


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


STUDENT = Voice(drawn(0, 5, 4), drawn(1, 10, 4), drawn(2, 10))
SEEN = Voice(drawn(3, 5, 3), drawn(4, 11, 3), drawn(5, 11))
UNSEEN = Voice(drawn(6, 4, 3), SEEN.head_UE, SEEN.bias_U)
OWN = Voice(drawn(7, 4, 4), STUDENT.head_UE, STUDENT.bias_U)
ROW_N = torch.tensor([-1, 2, 0, -1, 3])  # two rows of the call are none of the four responses


def log_probabilities(voice: Voice) -> Tensor:
    assert voice.bias_U is not None
    return ((voice.hidden_NE @ voice.head_UE.T + voice.bias_U)[:, :COMMON].double() / T).log_softmax(1)


def by_hand(hidden_ND: Tensor, kind: str) -> Tensor:
    """KL with q, and of the changed rows gamma KL with q*, each by its own sum."""
    log_p_NV, log_q_NV = log_probabilities(STUDENT._replace(hidden_NE=hidden_ND)), log_probabilities(SEEN)
    log_text_MV, log_own_MV = log_probabilities(UNSEEN), log_probabilities(OWN)
    total = torch.zeros((), dtype=torch.float64)
    for n, m in enumerate(ROW_N.tolist()):
        targets = [(1.0, log_q_NV[n])]
        if m >= 0:
            star_V = log_own_MV[m].exp() * log_q_NV[n].exp() / log_text_MV[m].exp()
            targets.append((GAMMA, (star_V / star_V.sum()).log()))
        for weight, log_t_V in targets:
            first, second = (log_t_V, log_p_NV[n]) if kind == "forward" else (log_p_NV[n], log_t_V)
            total = total + weight * T**2 * (first.exp() * (first - second)).sum()
    return total


@pytest.mark.parametrize("losses", FORMULAS)
@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_the_gradient_is_that_of_both_divergences(losses: str, kind: Literal["forward", "reverse"]) -> None:
    expected_ND = torch.autograd.grad(
        by_hand(hidden_ND := STUDENT.hidden_NE.clone().requires_grad_(), kind), hidden_ND
    )[0]
    change = ContrastTarget(
        unseen=UNSEEN, own=OWN, row_N=ROW_N, gamma=GAMMA, kind=kind, temperature=T, num_common=COMMON
    )
    hidden_ND = STUDENT.hidden_NE.clone().requires_grad_()
    found = FORMULAS[losses].head_loss(
        hidden_ND,
        STUDENT.head_UE,
        torch.zeros(5, dtype=torch.long),
        ce_weight_N=torch.zeros(5),
        student_bias_V=STUDENT.bias_U,
        teacher_NE=SEEN.hidden_NE,
        teacher_head_UE=SEEN.head_UE,
        teacher_bias_U=SEEN.bias_U,
        kl_weight_N=torch.where(ROW_N >= 0, 1 + GAMMA, 1.0),
        temperature=T,
        divergence=Divergence(kind),
        num_common=COMMON,
        teacher_change=change,
    )
    torch.testing.assert_close(
        torch.autograd.grad(found.loss, hidden_ND)[0], expected_ND, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_where_both_say_the_same_without_the_picture_the_target_is_the_teachers(
    kind: Literal["forward", "reverse"],
) -> None:
    logits_NU = SEEN.hidden_NE @ SEEN.head_UE.T
    before_NV = (logits_NU[:, :COMMON] / T).softmax(1)
    ContrastTarget(
        unseen=UNSEEN, own=UNSEEN, row_N=ROW_N, gamma=GAMMA, kind=kind, temperature=T, num_common=COMMON
    )(torch.arange(5), logits_NU)
    torch.testing.assert_close((logits_NU[:, :COMMON] / T).softmax(1), before_NV)
    assert bool((logits_NU[ROW_N >= 0, COMMON:] == -torch.inf).all())
    assert bool(logits_NU[ROW_N < 0].isfinite().all())
