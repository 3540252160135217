"""The same stretch of an answer, read by two models that cut it into other tokens.

A stretch is the least text at whose ends both tokenisations have a boundary. On either side p is the softmax
of z / T over the tokens of its tokenizer at the first row of the stretch, and c the product of the
probabilities of the stretch's further tokens, each at its own row; 1 where there are none. As GOLD merges
them (`trl.experimental.gold`, 2026: the distribution at the first position, times the others as scalars),

    q(v) = c p(v)

so that q of the token that does stand there is the probability of the whole stretch. It sums to c: what
is not said to follow another first token is taken to follow it as likely. With M the pairs of tokens that
spell the same bytes, but for the two that stand there, which are always a pair (below), a stretch is

    T^2 D(q_t || q_s over M) + w sum_k |sort(q_t outside M)_k - sort(q_s outside M)_k|

The second part is ULD (arXiv 2402.12030), the shorter list filled up with zeros. D is a divergence of masses
that need not sum to 1, at least 0, and 0 for equal ones alone:

    forward   sum q_t log(q_t / q_s) - q_t + q_s        reverse   the same with both exchanged
    jsd       b D(q_t || m) + (1 - b) D(q_s || m), m = b q_t + (1 - b) q_s

Over all of two equal vocabularies that is the divergence of `divergence.py`. GOLD leaves the masses out of D,
which may then fall below 0, and weighs both parts by the matched share of the vocabulary.

The first tokens that stand in a stretch spell its text on both sides, with the tokens after them: q of both
is of one event. M has them as a pair in that row, and what the tables pair with either of them is outside it
there (`standing.py`). Ours, where GOLD asks the tables alone: with `large` the teacher's token, and `l` and
four more letters the student's, they compare q_s(l), the student's probability of the whole stretch, with
what the teacher gives its own token `l`, about 0, and the masses of D would draw the right stretch to 0.

Arithmetic is fp32 (fp64 for fp64 inputs). The teacher receives no gradient.

Shape legend: S stretches, R further tokens, V rows of a head, D width, C some of the rows, K pairs of tokens,
A and B the tokens of student and teacher that are in no pair, W tokens of a tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from llava_kd.losses.cross.standing import Grouped, Standing, standing_of
from llava_kd.losses.divergence import FORWARD, Divergence, divergence_rows
from llava_kd.losses.kernels.rows import chunk_size
from llava_kd.losses.kernels.summed import Side, leading_logits, sum_of_rows
from llava_kd.losses.reference import accumulation_dtype, head_logits

COPIES = 9  # of a chunk's logits, a side: as they come, chosen, their softmax, grouped, sorted, gradients


@dataclass(frozen=True, kw_only=True)
class Words:
    """Columns of both heads: the pairs that are the same token, in one order, and the others of each."""

    student_K: Tensor
    teacher_K: Tensor
    student_A: Tensor
    teacher_B: Tensor

    @property
    def sides(self) -> tuple[Tensor, Tensor]:
        """[W] of student and of teacher, pairs first."""
        return torch.cat([self.student_K, self.student_A]), torch.cat([self.teacher_K, self.teacher_B])

    @property
    def num_pairs(self) -> int:
        return len(self.student_K)


class Stretched(NamedTuple):
    """One side: states and tokens of the first rows; of further ones the number of their stretch too."""

    first_SD: Tensor
    first_tokens_S: Tensor
    further_RD: Tensor
    tokens_R: Tensor
    stretch_R: Tensor
    head_VD: Tensor
    bias_V: Tensor | None = None
    cap: float | None = None

    def side(self, states_CD: Tensor) -> Side:
        """Its head, to be read at some states."""
        return Side(states_CD, self.head_VD, self.bias_V, self.cap)


class StretchLoss(NamedTuple):
    """`loss` = sum of the stretches, differentiable; they, and the teacher's share of p in pairs, are not.

    `ruled_S`: where one side is projected, the share of its p that has a rule.
    """

    loss: Tensor
    rows_S: Tensor
    paired_S: Tensor
    ruled_S: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Distance:
    """`unpaired` is w."""

    temperature: float = 1.0
    divergence: Divergence = FORWARD
    unpaired: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"the temperature of stretches must be above 0; got {self.temperature}")
        if self.divergence.kind not in ("forward", "reverse", "jsd"):
            raise ValueError(
                f"stretches are compared by forward, reverse or jsd; got {self.divergence.kind!r}"
            )

    def masses(self, student_CK: Tensor, teacher_CK: Tensor) -> Tensor:
        """[C]: D, of the logarithms of masses in the same columns, without T^2."""
        rows_C = divergence_rows(student_CK, teacher_CK, self.divergence)
        if self.divergence.kind == "jsd":  # whose masses cancel
            return rows_C
        sign = 1 if self.divergence.kind == "forward" else -1
        return rows_C + sign * (student_CK.exp().sum(1) - teacher_CK.exp().sum(1))

    def rows(self, student: Grouped, teacher: Grouped) -> Tensor:
        """[C], of log q of both sides."""
        rows_C = self.masses(student.pairs_CK, teacher.pairs_CK)
        sorted_ = [side.alone_CA.exp().sort(dim=1, descending=True).values for side in (student, teacher)]
        longest = max(q_C.shape[1] for q_C in sorted_)
        s, t = (pad(q_C, (0, longest - q_C.shape[1])) for q_C in sorted_)
        return self.temperature**2 * rows_C + self.unpaired * (s - t).abs().sum(1)


def stretch_loss(student: Stretched, teacher: Stretched, words: Words, distance: Distance) -> StretchLoss:
    """The plain form: all logits at once."""
    check(student, teacher, words)
    with torch.autocast(student.first_SD.device.type, enabled=False):
        temperature, (mine_W, theirs_W) = distance.temperature, words.sides
        mine, theirs = _standing(student, teacher, words)
        student_SW = log_p(logits(student.first_SD, student), mine_W, temperature)
        further_R = log_p(logits(student.further_RD, student), mine_W, temperature, student.tokens_R)
        student_SW = student_SW + _sums(further_R, student).unsqueeze(1)
        with torch.no_grad():
            first_SW = log_p(logits(teacher.first_SD, teacher), theirs_W, temperature)
            further_R = log_p(logits(teacher.further_RD, teacher), theirs_W, temperature, teacher.tokens_R)
            teacher_SW = first_SW + _sums(further_R, teacher).unsqueeze(1)
        grouped = mine.grouped(student_SW), theirs.grouped(teacher_SW.to(student_SW.dtype))
        rows_S = distance.rows(*grouped)
        paired_S = theirs.pairs(first_SW).exp().sum(1)
    return StretchLoss(loss=rows_S.sum(), rows_S=rows_S.detach(), paired_S=paired_S)


def stretch_loss_by_chunk(
    student: Stretched,
    teacher: Stretched,
    words: Words,
    distance: Distance,
    *,
    chunk_rows: int | None = None,
) -> StretchLoss:
    """What `stretch_loss` returns, some rows at a time: [S, V] never exists, and no graph outlives a chunk.

    Further tokens go through the head twice: their probabilities first, and their gradient when that of c is
    known.
    """
    check(student, teacher, words)
    mine_W, theirs_W = words.sides
    mine, theirs = _standing(student, teacher, words)
    widest = student.head_VD.shape[0] + teacher.head_VD.shape[0]
    size = chunk_rows or chunk_size(
        max(1, len(student.first_SD)), bytes_per_row=4 * COPIES * widest, device=mine_W.device
    )
    log_c_S, theirs_S = (
        _sums(_further(side, columns_W, distance.temperature, size), side)
        for side, columns_W in ((student, mine_W), (teacher, theirs_W))
    )
    slope_S, paired_S = torch.zeros_like(log_c_S), torch.zeros_like(theirs_S)
    wants_slope = torch.is_grad_enabled() and len(student.tokens_R) > 0

    def first_rows(part: slice, logits_CV: Tensor) -> Tensor:
        with torch.no_grad():
            logits_CU = leading_logits(teacher.side(teacher.first_SD[part]), teacher.head_VD.shape[0])
            first_CW = log_p(logits_CU, theirs_W, distance.temperature)
            paired_S[part] = theirs.of(part).pairs(first_CW).exp().sum(1)
            teacher_CW = (first_CW + theirs_S[part].unsqueeze(1)).to(logits_CV.dtype)
            said = theirs.of(part).grouped(teacher_CW)
        log_c_C = log_c_S[part].requires_grad_(wants_slope)
        student_CW = log_p(logits_CV, mine_W, distance.temperature) + log_c_C.unsqueeze(1)
        rows_C = distance.rows(mine.of(part).grouped(student_CW), said)
        if wants_slope:
            (slope_S[part],) = torch.autograd.grad(rows_C.sum(), log_c_C, retain_graph=True)
        return rows_C

    def further_rows(part: slice, logits_CV: Tensor) -> Tensor:
        log_p_C = log_p(logits_CV, mine_W, distance.temperature, student.tokens_R[part])
        return slope_S[student.stretch_R[part]] * log_p_C

    num_columns = student.head_VD.shape[0]
    found = sum_of_rows(student.side(student.first_SD), first_rows, num_columns=num_columns, chunk_rows=size)
    loss = found.loss
    if wants_slope:
        side = student.side(student.further_RD)
        through_c = sum_of_rows(side, further_rows, num_columns=num_columns, chunk_rows=size).loss
        loss = loss + (through_c - through_c.detach())  # of no value: its gradient is what c adds
    return StretchLoss(loss=loss, rows_S=found.rows_N.detach(), paired_S=paired_S)


def check(student: Stretched, teacher: Stretched, words: Words) -> None:
    """ValueError for two sides that do not have the same stretches, or columns that a head lacks."""
    if len(student.first_SD) != len(teacher.first_SD):
        raise ValueError(
            f"both sides must have the same stretches; the student has {len(student.first_SD)}, the teacher "
            f"{len(teacher.first_SD)}"
        )
    for name, side in (("student", student), ("teacher", teacher)):
        if len(side.first_tokens_S) != len(side.first_SD):
            raise ValueError(
                f"each stretch needs the token that stands first in it; the {name} has {len(side.first_SD)} "
                f"stretches and {len(side.first_tokens_S)} such tokens"
            )
    if len(words.student_K) != len(words.teacher_K):
        raise ValueError(
            f"tokens must be in pairs; got {len(words.student_K)} of the student and "
            f"{len(words.teacher_K)} of the teacher"
        )


def log_p(logits_CV: Tensor, columns_W: Tensor, temperature: float, tokens_C: Tensor | None = None) -> Tensor:
    """Log-softmax over these columns: [C, W], or [C] at a token of each row."""
    logits_CW = logits_CV.index_select(1, columns_W) / temperature
    if tokens_C is None:
        return logits_CW.log_softmax(1)
    at_C = logits_CV.gather(1, tokens_C.unsqueeze(1)).squeeze(1) / temperature
    return at_C - logits_CW.logsumexp(1)


def _standing(student: Stretched, teacher: Stretched, words: Words) -> tuple[Standing, Standing]:
    return standing_of(student.first_tokens_S, teacher.first_tokens_S, words.sides, words.num_pairs)


def _further(side: Stretched, columns_W: Tensor, temperature: float, size: int) -> Tensor:
    """[R]: log-probabilities of the further tokens, without gradient."""
    found = [side.further_RD.new_zeros(0, dtype=accumulation_dtype(side.further_RD))]
    with torch.no_grad(), torch.autocast(side.further_RD.device.type, enabled=False):
        for begin in range(0, len(side.tokens_R), size):
            part = slice(begin, begin + size)
            logits_CV = leading_logits(side.side(side.further_RD[part]), side.head_VD.shape[0])
            found.append(log_p(logits_CV, columns_W, temperature, side.tokens_R[part]))
    return torch.cat(found)


def _sums(further_R: Tensor, side: Stretched) -> Tensor:
    """[S]: log c."""
    zeros_S = further_R.new_zeros(len(side.first_SD))
    return zeros_S.index_add(0, side.stretch_R, further_R)


def logits(states_CD: Tensor, side: Stretched) -> Tensor:
    return head_logits(*side.side(states_CD))
