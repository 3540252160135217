"""The first token of a stretch on either side, after one side's was carried into the other's vocabulary.

With p the softmaxes of z / T at the first row of a stretch and W a sparse matrix whose rows sum to 1 where a
token has a rule (`models/words/projection.py`), a stretch is one of

    onto_teacher   T^2 D(p_t || p_s W over the columns of W)       X-Token's P-KL, arXiv 2605.21699
    onto_student   T^2 D(p_t W || p_s over the columns of W)

with the D of masses of `stretches.py`: the mass of what has no rule is missing on its side, and so is that
of tokens that nothing is carried to. With W the identity both are the divergence of `divergence.py`. Of the
paper are the matrix, its rules, and that D runs over the whole vocabulary without a partition. Ours: X-Token
compares means over the rows of a stretch, at the teacher's likeliest columns, scaled to sum 1; here the first
rows alone are compared, at all columns and as they are, so further tokens of a stretch learn from labels
alone.

Sums are taken in logarithms, so that no probability underflows before it is carried. Arithmetic is fp32 (fp64
for fp64 inputs). The teacher receives no gradient.

Shape legend: S stretches, V rows of a head, C some of the rows, E entries of W, W tokens of a tokenizer, K
columns of W that have entries.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from llava_kd.losses.cross.standing import places_among
from llava_kd.losses.cross.stretches import (
    COPIES,
    Distance,
    Stretched,
    StretchLoss,
    Words,
    check,
    log_p,
    logits,
)
from llava_kd.losses.kernels.rows import chunk_size
from llava_kd.losses.kernels.summed import leading_logits, sum_of_rows
from llava_kd.losses.reference import accumulation_dtype

Onto = Literal["onto_teacher", "onto_student"]


class Projection:
    """W by its entries, between the tokens of both sides as `Words.sides` orders them."""

    def __init__(self, onto: Onto, words: Words, from_E: Tensor, to_E: Tensor, weight_E: Tensor) -> None:
        """From columns of one head to columns of the other, as `onto` says.

        ValueError for columns that are no token of their side, and for no entry.
        """
        if not len(from_E) == len(to_E) == len(weight_E) > 0:
            raise ValueError(
                "a projection needs one source, target and weight for each of its entries, and an entry; got "
                f"{len(from_E)}, {len(to_E)} and {len(weight_E)}"
            )
        mine_W, theirs_W = words.sides
        self.words, self.num_entries = words, len(from_E)
        self._is_onto_teacher = onto == "onto_teacher"
        source_W, target_W = (mine_W, theirs_W) if self._is_onto_teacher else (theirs_W, mine_W)
        to_E, order_E = _places(to_E, target_W).sort(stable=True)
        self._from_E = _places(from_E, source_W)[order_E]
        self._log_weight_E = weight_E[order_E].log()
        self._to_K, self._lengths_K = to_E.unique_consecutive(return_counts=True)
        whole_W = weight_E.new_zeros(len(source_W))
        self._whole_W = whole_W.index_add(0, self._from_E, weight_E[order_E])

    def rows(self, student_CW: Tensor, teacher_CW: Tensor, distance: Distance) -> Tensor:
        """[C], of log p of both sides."""
        source, target = self._in_order(student_CW, teacher_CW)
        source_CK, target_CK = self._carry(source), target.index_select(1, self._to_K)
        student_CK, teacher_CK = self._in_order(source_CK, target_CK)
        return distance.temperature**2 * distance.masses(student_CK, teacher_CK)

    @torch.no_grad()
    def shares(self, student_CW: Tensor, teacher_CW: Tensor) -> tuple[Tensor, Tensor]:
        """[C] of the teacher's p that is compared, and [C] of the p that is carried which has a rule."""
        source, target = self._in_order(student_CW, teacher_CW)
        carried_C = source.exp() @ self._whole_W.to(source.dtype)
        reached_C = target.index_select(1, self._to_K).exp().sum(1)
        return (reached_C if self._is_onto_teacher else carried_C), carried_C

    def _in_order(self, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """What is carried and what it is carried to, of student and teacher, and back again."""
        return (one, other) if self._is_onto_teacher else (other, one)

    def _carry(self, log_p_CW: Tensor) -> Tensor:
        """[C, K]: logarithms of sums, each over entries that lie together: their order is always the same."""
        parts_EC = log_p_CW.T.index_select(0, self._from_E) + self._log_weight_E.to(log_p_CW).unsqueeze(1)
        lengths_K = self._lengths_K
        top_KC = torch.segment_reduce(parts_EC.detach(), "max", lengths=lengths_K, unsafe=True)
        scaled_EC = (parts_EC - top_KC.repeat_interleave(lengths_K, 0, output_size=len(parts_EC))).exp()
        sum_KC = torch.segment_reduce(scaled_EC, "sum", lengths=lengths_K, unsafe=True)
        return (sum_KC.log() + top_KC).T


def projected_loss(
    student: Stretched, teacher: Stretched, projection: Projection, distance: Distance
) -> StretchLoss:
    """The plain form: all logits at once. `paired_S`: the teacher's share of p that is compared."""
    check(student, teacher, projection.words)
    mine_W, theirs_W = projection.words.sides
    with torch.autocast(student.first_SD.device.type, enabled=False):
        student_SW = log_p(logits(student.first_SD, student), mine_W, distance.temperature)
        with torch.no_grad():
            teacher_SW = log_p(logits(teacher.first_SD, teacher), theirs_W, distance.temperature)
            teacher_SW = teacher_SW.to(student_SW.dtype)
        if len(student_SW) == 0:
            none_S = student_SW.detach().sum(1)
            return StretchLoss(student_SW.sum(), none_S, none_S, none_S)
        rows_S = projection.rows(student_SW, teacher_SW, distance)
        compared_S, ruled_S = projection.shares(student_SW, teacher_SW)
    return StretchLoss(rows_S.sum(), rows_S.detach(), compared_S, ruled_S)


def projected_loss_by_chunk(
    student: Stretched,
    teacher: Stretched,
    projection: Projection,
    distance: Distance,
    *,
    chunk_rows: int | None = None,
) -> StretchLoss:
    """What `projected_loss` returns, some rows at a time: [S, V] never exists."""
    check(student, teacher, projection.words)
    mine_W, theirs_W = projection.words.sides
    widest = student.head_VD.shape[0] + teacher.head_VD.shape[0] + projection.num_entries
    size = chunk_rows or chunk_size(
        max(1, len(student.first_SD)), bytes_per_row=4 * COPIES * widest, device=mine_W.device
    )
    dtype = accumulation_dtype(student.first_SD)
    compared_S, ruled_S = (student.first_SD.new_zeros(len(student.first_SD), dtype=dtype) for _ in range(2))

    def of_rows(part: slice, logits_CV: Tensor) -> Tensor:
        student_CW = log_p(logits_CV, mine_W, distance.temperature)
        with torch.no_grad():
            logits_CU = leading_logits(teacher.side(teacher.first_SD[part]), teacher.head_VD.shape[0])
            teacher_CW = log_p(logits_CU, theirs_W, distance.temperature).to(student_CW.dtype)
            compared_S[part], ruled_S[part] = projection.shares(student_CW, teacher_CW)
        return projection.rows(student_CW, teacher_CW, distance)

    side = student.side(student.first_SD)
    found = sum_of_rows(side, of_rows, num_columns=student.head_VD.shape[0], chunk_rows=size)
    return StretchLoss(found.loss, found.rows_N.detach(), compared_S, ruled_S)


def _places(columns_E: Tensor, side_W: Tensor) -> Tensor:
    """[E]: where these columns are among a side's tokens. ValueError for one that is no token of it."""
    places_E, is_other_E = places_among(columns_E, side_W)
    if bool(is_other_E.any()):
        raise ValueError("a projection must go from tokens of one side to tokens of the other")
    return places_E
