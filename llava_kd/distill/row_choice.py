"""Which of a term's rows count, and by how much, where its request to the head asks for less than all alike.

Shape legend: N selected rows, M and N visual tokens of an image on the teacher's and the student's side,
I images, J valid images, K chosen tokens of an image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llava_kd.batch import Batch
from llava_kd.distill.formulas import Align, Common
from llava_kd.distill.rows import Rows
from llava_kd.distill.taught import AnyPrediction, Dependency, MixedPrediction, TopKPrediction
from llava_kd.distill.terms.term import LISTED, HeadRequest
from llava_kd.distill.token_policy import PolicyRows
from llava_kd.losses.label import LabelRows, top_k_label_rows
from llava_kd.losses.row_figures import row_figures
from llava_kd.models.mllm import Prediction

_LEAST = 1e-30  # of what a token is attended to


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Rows of a term, and what each one's divergence is multiplied by.

    `picked_N`: their numbers among all rows of the place, None where all are there.
    `is_counted`: how many have a factor of 0 is known on the host. `ce_factor_N`: what each one's
    cross-entropy is multiplied by, None is 1.
    """

    rows: Rows
    factor_N: Tensor
    picked_N: Tensor | None = None
    is_counted: bool = True
    ce_factor_N: Tensor | None = None

    def under(self, policy: PolicyRows) -> Chosen:
        """All response rows, as a policy for private tokens weighs them."""
        kl_N, ce_N = policy.kl_N, policy.cross_entropy_N
        return replace(
            self,
            factor_N=self.factor_N if kl_N is None else self.factor_N * kl_N,
            is_counted=self.is_counted and kl_N is None and ce_N is None,
            ce_factor_N=ce_N,
        )

    def labelled(self, weight_N: Tensor) -> Chosen:
        """All response rows, whose labels count so much."""
        return replace(self, ce_factor_N=weight_N, is_counted=False)

    def weighed(self, dependency: Dependency) -> Chosen:
        """All response rows, whose divergences count so much."""
        return replace(
            self,
            factor_N=self.factor_N * dependency.factor_N,
            is_counted=self.is_counted and not dependency.drops_rows,
        )


def choose(
    rows: Rows,
    request: HeadRequest | None,
    batch: Batch,
    models: tuple[Prediction, AnyPrediction | None],
    common: Common,
) -> Chosen:
    """Of all rows of a place, those of a request for a divergence; None stands for no such request.

    `models`: what the student and the teacher said.
    """
    student, teacher = models
    every = Chosen(rows=rows, factor_N=rows.is_shared_N)
    if request is None or teacher is None:
        return every
    if request.share < 1 or request.weighed:
        return _attended(rows, request, batch, teacher, common.align)
    if request.trust != "all":
        factor_N = rows.is_shared_N * _trust(rows, request, student, teacher, common)
        return replace(every, factor_N=factor_N, is_counted=False)
    return every


def _attended(
    rows: Rows, request: HeadRequest, batch: Batch, teacher: AnyPrediction, align: Align | None
) -> Chosen:
    """The same number of every image, whose factors sum to all of its tokens.

    Of an image that no text attends to, the first tokens, alike.
    """
    attended_IM = teacher.attended_IN if isinstance(teacher, Prediction) else None
    if attended_IM is None:
        raise ValueError(
            "a share of the visual tokens, or weights, needs a prediction of a teacher whose attention is "
            "recorded"
        )
    attended_IN = attended_IM if align is None else align(attended_IM.unsqueeze(2)).squeeze(2)
    attended_JN = attended_IN[batch.student.places.valid_images_N]
    num_images, num_tokens = attended_JN.shape
    kept = math.ceil(request.share * num_tokens - 1e-9)
    # Stable, so that ties fall alike on every device.
    order_JN = attended_JN.sort(dim=1, descending=True, stable=True).indices
    first_J1 = torch.arange(num_images, device=order_JN.device).unsqueeze(1) * num_tokens
    picked_N = (order_JN[:, :kept] + first_J1).flatten()
    taken = rows.take(picked_N)
    if request.weighed:
        # Never 0, so that the host knows how many rows count.
        chosen_JK = attended_JN.gather(1, order_JN[:, :kept]).float().clamp_min(_LEAST)
        weight_N = (num_tokens * chosen_JK / chosen_JK.sum(1, keepdim=True)).flatten()
    else:
        weight_N = num_tokens / max(kept, 1)
    factor_N = taken.is_shared_N * weight_N
    return Chosen(rows=taken, factor_N=factor_N, picked_N=picked_N)


@torch.no_grad()
def _trust(
    rows: Rows, request: HeadRequest, student: Prediction, teacher: AnyPrediction, common: Common
) -> Tensor:
    trust = request.trust
    if isinstance(teacher, MixedPrediction):
        raise ValueError(f"trust in the first choice or probability needs a single teacher; got {trust!r}")
    if trust == "choice_listed":
        rows = replace(rows, targets_N=_choices(student, rows, common))
    if isinstance(teacher, TopKPrediction):
        kept = teacher.logits_BTK.shape[2]
        if trust in LISTED and request.listed > kept:
            raise ValueError(
                f"the {request.listed} largest logits of the teacher are needed, and {kept} are kept; lower "
                "response_kl.listed, or write a cache with more"
            )
        found = top_k_label_rows(teacher.top_k(rows.teacher_N), rows.targets_N)
    else:
        found = _label_rows(teacher, rows.teacher_N, rows, common)
    if trust in LISTED:
        return (found.before_N < request.listed).float()
    if trust in ("better", "worse"):
        own_N = _label_rows(student, rows.student_N, rows, common).nll_N
        is_taught_N = found.nll_N < own_N if trust == "better" else found.nll_N > own_N
        return is_taught_N.float()
    return found.is_first_N.float() if trust == "first" else found.probability_N


def _choices(student: Prediction, rows: Rows, common: Common) -> Tensor:
    """The column that the student would say at each row."""
    hidden_ND = student.hidden_BTD.flatten(0, 1)[rows.student_N]
    targets_N = torch.zeros_like(rows.targets_N)
    how = {"num_common": common.num_common, "cap": student.cap}
    return row_figures(hidden_ND, student.head_VD, student.bias_V, targets_N, **how).choice_N


def _label_rows(side: Prediction, rows_N: Tensor, rows: Rows, common: Common) -> LabelRows:
    return common.formulas.label_rows(
        side.hidden_BTD.flatten(0, 1)[rows_N],
        side.head_VD,
        rows.targets_N,
        bias_V=side.bias_V,
        cap=side.cap,
        num_common=common.num_common,
    )
