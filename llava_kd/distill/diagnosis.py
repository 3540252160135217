"""What a loss does not say: how hard each term pulls at the student, and how far both models agree.

**Gradients.** A term's gradient is taken with respect to the weight W, the identity, of a linear layer
between the student's final hidden states h and its head: dL/dW = sum over tokens of g h^T, where g is the
gradient of the weighted term with respect to W h. It is summed over all micro-batches and ranks of the
optimiser step before its Frobenius norm is taken, so the norm does not depend on how a step is cut, and
tokens that pull against each other cancel, as they do in any weight. GradNorm (arXiv 1711.02257) compares
tasks by the gradient of the last layer they share for the same reason as here: the whole backward of each
term would cost a step or more, and could not be had from sharded engines without their help. Neither the
layer nor its gradient exists in training: the terms are computed a second time on states that are cut off its
graph, and random numbers that they draw are given back.

**Tokens.** Loss, entropy and first choice of both models at the response targets that are the same tokens on
both sides, at temperature 1.

Shape legend: B rows, T tokens, N selected rows, K stored columns, D width of the student.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from llava_kd.batch import Batch, Counts
from llava_kd.distill.objective import Objective
from llava_kd.distill.rows import Rows
from llava_kd.distill.taught import AnyPrediction, MixedPrediction, Taught, TopKPrediction
from llava_kd.distill.terms.term import Term
from llava_kd.losses.reference import ChangeRows
from llava_kd.losses.row_figures import RowFigures, row_figures
from llava_kd.models.mllm import Prediction

NORM, SHARE, TOKENS = "gradient/", "gradient_share/", "tokens/"


def measured(terms: Mapping[str, Term]) -> list[str]:
    """Those whose whole gradient goes through the final hidden states, in their order."""
    return [name for name, term in terms.items() if term.weight > 0 and term.reads.at_final_states]


class Diagnosis:
    """Of one optimiser step: sums over its micro-batches, then figures over all ranks."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._outer_DD: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}

    def look(self, student: Prediction, taught: Taught, batch: Batch, counts: Counts) -> None:
        """Add a micro-batch, as the objective sees it: where a sharding engine has gathered the head."""
        device = student.hidden_BTD.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            factors = self._factors()
            for name in measured(self._objective.terms):
                outer_DD = self._outer(name, student, taught, batch, counts) * factors.get(name, 1.0)
                self._outer_DD[name] = self._outer_DD.get(name, 0.0) + outer_DD
            for name, value in self._compare(student, taught.prediction, batch).items():
                self._sums[name] = self._sums.get(name, 0.0) + value

    def figures(self, total: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """By their names in the log; `total` sums over ranks, all of which ask alike."""
        norms = {name: total(outer_DD).norm() for name, outer_DD in self._outer_DD.items()}
        found = {f"{NORM}{name}": norm for name, norm in norms.items()}
        if norms:
            whole = torch.stack(list(norms.values())).sum()
            whole = whole.clamp_min(torch.finfo(whole.dtype).tiny)
            found |= {f"{SHARE}{name}": norm / whole for name, norm in norms.items()}
        rows, *others = total(torch.stack(list(self._sums.values()))).unbind()
        names = list(self._sums)[1:]
        return found | {f"{TOKENS}{n}": v / rows.clamp_min(1) for n, v in zip(names, others, strict=True)}

    @torch.no_grad()
    def _factors(self) -> dict[str, Tensor]:
        """Of the weights that are set, where they are learned."""
        learned = self._objective.learned
        return {} if learned is None else learned.factors(learned())

    def _outer(self, name: str, student: Prediction, taught: Taught, batch: Batch, counts: Counts) -> Tensor:
        """[D, D]: what the micro-batch adds to the gradient of one term alone."""
        hidden_BTD = student.hidden_BTD.detach().requires_grad_()
        cut = replace(
            student,
            hidden_BTD=hidden_BTD,
            head_VD=student.head_VD.detach(),
            bias_V=None if student.bias_V is None else student.bias_V.detach(),
        )
        alone = replace(self._objective, terms={name: self._objective.terms[name]}, learned=None)
        with torch.enable_grad():
            loss = alone(cut, taught, batch, counts).loss
            (gradient_BTD,) = torch.autograd.grad(loss, hidden_BTD)
        dtype = torch.promote_types(hidden_BTD.dtype, torch.float32)
        gradient_ND, states_ND = (t.detach().flatten(0, 1).to(dtype) for t in (gradient_BTD, hidden_BTD))
        with torch.autocast(hidden_BTD.device.type, enabled=False):
            return gradient_ND.T @ states_ND

    @torch.no_grad()
    def _compare(self, student: Prediction, teacher: AnyPrediction | None, batch: Batch) -> dict[str, Tensor]:
        """Sums over the rows that both sides answer alike, their number first."""
        if self._objective.common.words is not None:
            teacher = None  # its tokens are others: no row of it is beside one of the student's
        rows = Rows.select("response", batch, with_teacher=teacher is not None)
        shared_N = rows.is_shared_N.double()
        num_common = self._objective.common.num_common

        def said(side: Prediction, rows_N: Tensor, change: ChangeRows | None = None) -> RowFigures:
            states_ND = side.hidden_BTD.flatten(0, 1)[rows_N]
            how = {"num_common": num_common, "cap": side.cap, "change": change}
            return row_figures(states_ND, side.head_VD, side.bias_V, rows.targets_N, **how)

        ours = said(student, rows.student_N)
        found = {"rows": shared_N, "student_nll": ours.nll_N, "student_entropy": ours.entropy_N}
        if isinstance(teacher, TopKPrediction):
            top = teacher.top_k(rows.teacher_N)
            best_N1 = top.logits_NK.argmax(1, keepdim=True)
            choice_N = top.columns_NK.gather(1, best_N1).squeeze(1)
            found["top1_agreement"] = ours.choice_N == choice_N
        elif teacher is not None:
            change = None
            if isinstance(teacher, MixedPrediction):
                change, teacher = teacher.target(rows.teacher_N), teacher.parts[0]
            theirs = said(teacher, rows.teacher_N, change)
            found |= {"teacher_nll": theirs.nll_N, "teacher_entropy": theirs.entropy_N}
            found["teacher_better"] = theirs.nll_N < ours.nll_N
            if num_common is not None:
                found["top1_agreement"] = ours.choice_N == theirs.choice_N
        return {name: torch.where(shared_N > 0, v.double(), 0.0).sum() for name, v in found.items()}
