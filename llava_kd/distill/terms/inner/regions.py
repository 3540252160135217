"""Hints for the regions of a picture in which the teacher is the surer side.

Shape legend: I images, N tokens of an image, P response tokens of its record, L visual tokens of valid
images, D and E widths of student and teacher.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor
from typing_extensions import Doc

from llava_kd.distill.terms.inner.hint import VisualHint
from llava_kd.distill.terms.seen import Seen
from llava_kd.distill.terms.term import Reads
from llava_kd.losses.inner.hint import Kind, hint_rows
from llava_kd.losses.inner.regions import taught, window_means
from llava_kd.losses.row_figures import row_figures


@dataclass(frozen=True, kw_only=True)
class VisualRegions(VisualHint):
    """A `visual_hint`, window by window of the grid."""

    kind: Annotated[Kind, Doc("Mean squared difference over the width, or 1 - cosine.")] = "cosine"
    window: Annotated[int, Ge(1), Doc("Side of a window, in visual tokens.")] = 2
    judged_by: Annotated[
        Literal["entropy", "answer"],
        Doc("Of each side: its mean entropy in the window, or its loss on the answers beside the picture."),
    ] = "entropy"
    trust: Annotated[
        Literal["better", "worse"], Doc("The teacher counts where it is the better side, or the worse one.")
    ] = "better"

    label: ClassVar[str] = "inner states of visual tokens, in windows where the teacher is the surer side"
    paper: ClassVar[str] = "CNN-ViT collaborative learning, arXiv 2307.12574, BSD"

    @property
    def reads(self) -> Reads:
        places = ("visual", "response") if self.judged_by == "answer" else ("visual",)
        return replace(super().reads, places=places, vocabulary=True)

    def total(self, seen: Seen) -> Tensor:
        pairs = self.mapped_pairs(seen)
        factor_L = self._factor(seen)
        return torch.stack([(factor_L * hint_rows(*pair, self.kind)).sum() for pair in pairs]).sum()

    @torch.no_grad()
    def _factor(self, seen: Seen) -> Tensor:
        values = self._entropy(seen) if self.judged_by == "entropy" else self._answers(seen)
        chosen_IN = taught(*values, reversed_=self.trust == "worse")
        return chosen_IN[seen.batch.student.places.valid_images_N].flatten()

    def _entropy(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """[I, N] of student and teacher: the same all over a window."""
        found = []
        for states_IND, head in zip(seen.features("hidden"), seen.heads(), strict=True):
            rows_ND = states_IND.flatten(0, 1)
            targets_N = torch.zeros(len(rows_ND), dtype=torch.long, device=rows_ND.device)
            how = {"num_common": seen.num_common, "cap": head.cap}
            said = row_figures(rows_ND, head.head_VD, head.bias_V, targets_N, **how)
            entropy_IN = said.entropy_N.view(states_IND.shape[:2])
            found.append(window_means(entropy_IN.float(), self.window))
        return found[0], found[1]

    def _answers(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """[I, N]: the loss of a record's answers stands for the whole of its pictures."""
        ours_IPD, theirs_IPE, is_there_IP = seen.answers_of_images()
        index_IP, _ = seen.batch.student.answers_of_images()
        targets_IP = seen.rows("response").targets_N[index_IP]
        num_tokens = seen.student_features("hidden").shape[1]
        found = []
        for states_IPD, head in zip((ours_IPD, theirs_IPE), seen.heads(), strict=True):
            said = seen.formulas.label_rows(
                states_IPD.flatten(0, 1),
                head.head_VD,
                targets_IP.flatten(),
                bias_V=head.bias_V,
                cap=head.cap,
                num_common=seen.num_common,
            )
            loss_IP = said.nll_N.view(targets_IP.shape).masked_fill(~is_there_IP, 0.0)
            # 0 where there is no answer: then neither side teaches.
            loss_I = loss_IP.sum(1) / is_there_IP.sum(1).clamp_min(1)
            found.append(loss_I.unsqueeze(1).expand(-1, num_tokens))
        return found[0], found[1]
