"""The target-enhanced loss of One-for-All (OFA-KD, arXiv 2310.19444), which early exits are trained by.

With p the teacher's probabilities, q the student's, g gamma and * the label, a row is a sum of -w log q with

| w, by form | at the label | elsewhere |
|---|---|---|
| `paper` | (1 + p)^g | p |
| `code`, as released (Hao840/OFAKD) | (1 + p)^g - 1 | p^g |

At g = 1 the first is cross-entropy + KD and the second KD alone, beside which that code has its
cross-entropy; at other g they differ in more: the second weakens (g > 1) all that is not the label. A row
without a label, as a visual token, has w = p, and p^g.

Both are what the head loss computes already: p^g is softmax(g z), of the teacher's logits z, times the sum of
p^g, so a row is, less a constant,

    sum(p^g) KL(softmax(g z), q) + ((1 + p*)^g - 1 - p*^g) CE      `code`
    KL(p, q) + ((1 + p*)^g - p*) CE                                `paper`

The constant, the entropy of what the student is to match, makes the KL 0 for a student that matches it.

Shape legend: N rows, U teacher vocabulary, E teacher width, C rows of a chunk.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from llava_kd.losses.head_loss import by_chunk

Form = Literal["paper", "code"]


class Enhanced(NamedTuple):
    """Of each row: weights of its divergence and of its cross-entropy, fp32. `sharpness` multiplies the
    teacher's logits. No gradient.
    """

    kl_weight_N: Tensor
    ce_weight_N: Tensor
    sharpness: float


def enhanced(
    teacher_NE: Tensor,
    head_UE: Tensor,
    labels_N: Tensor,
    *,
    gamma: float,
    form: Form,
    bias_U: Tensor | None = None,
    cap: float | None = None,
    num_common: int | None = None,
) -> Enhanced:
    """The rows as the head loss takes them, over the first `num_common` columns (default: all).

    A label below 0 is none. One that is no common column has p = 0. No [N, U] exists at once.
    """

    def of_chunk(index_C: Tensor, logits_CU: Tensor) -> tuple[Tensor, Tensor]:
        logp_CU = logits_CU[:, :num_common].log_softmax(1)
        labels_C = labels_N[index_C]
        is_common_C = (labels_C >= 0) & (labels_C < logp_CU.shape[1])
        logp_C = logp_CU.gather(1, torch.where(is_common_C, labels_C, 0).unsqueeze(1)).squeeze(1)
        mass_C = (gamma * logp_CU).logsumexp(1).exp() if form == "code" else torch.ones_like(logp_C)
        return (logp_C.exp() * is_common_C).float(), mass_C.float()

    p_N, mass_N = by_chunk(teacher_NE, head_UE, bias_U, of_chunk, cap=cap, copies=3)
    if form == "code":
        ce_weight_N = (1 + p_N) ** gamma - 1 - p_N**gamma
    else:
        ce_weight_N = (1 + p_N) ** gamma - p_N
    return Enhanced(mass_N, ce_weight_N * (labels_N >= 0), gamma if form == "code" else 1.0)
