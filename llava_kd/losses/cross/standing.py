"""Which masses of a stretch are compared as pairs, and which by rank: by the tables and by what stands there.

The first tokens that stand in a stretch on both sides are one event, for both spell the stretch's text with
the tokens after them, whatever they spell alone: where the teacher has `large` and the student `l`, `a`, `r`,
`g` and `e`, q of either is the probability of the whole. The tables of tokens that spell the same know
another partner for `l`, or none. In that row the two that stand are a pair and have no other: what was the
partner of one of them is in no pair, and is compared by rank. Where the tables already pair them nothing
changes.

Shape legend: C rows, one a stretch, W tokens of a side, its pairs first, K pairs of the tables, A its tokens
that are in none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

NOTHING = -1e4  # for the logarithm of a mass that is not there: finite, and its exponential is 0


class Grouped(NamedTuple):
    """Log q of some rows: of pairs, in one order on both sides, [C, K + 1], and of the others, [C, A + 1]."""

    pairs_CK: Tensor
    alone_CA: Tensor


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Of one side, where among its tokens that which stands first is, and the other's among the other's."""

    own_C: Tensor
    other_C: Tensor
    num_pairs: int

    @property
    def is_apart_C(self) -> Tensor:
        """Whether the tables do not have them as a pair."""
        return (self.own_C != self.other_C) | (self.own_C >= self.num_pairs)

    def of(self, rows: slice) -> Standing:
        """Some of the rows."""
        return Standing(own_C=self.own_C[rows], other_C=self.other_C[rows], num_pairs=self.num_pairs)

    def grouped(self, log_q_CW: Tensor) -> Grouped:
        return Grouped(self.pairs(log_q_CW), self.alone(log_q_CW))

    def pairs(self, log_q_CW: Tensor) -> Tensor:
        """[C, K + 1]: pairs of the tables that hold, and what stands, where they do not have it as a pair."""
        last, are_apart_C1 = self.num_pairs, self.is_apart_C.unsqueeze(1)
        gone_C2 = torch.stack([self.own_C, self.other_C], 1)
        gone_C2 = torch.where(are_apart_C1 & (gone_C2 < last), gone_C2, last)
        stands_C1 = log_q_CW.gather(1, self.own_C.unsqueeze(1)).where(are_apart_C1, NOTHING)
        return _changed(log_q_CW[:, :last], gone_C2, stands_C1)

    def alone(self, log_q_CW: Tensor) -> Tensor:
        """[C, A + 1]: tokens in no pair, without what stands, and the partner that the other's token had."""
        first, are_apart_C1 = self.num_pairs, self.is_apart_C.unsqueeze(1)
        own_C1, other_C1 = self.own_C.unsqueeze(1), self.other_C.unsqueeze(1)
        gone_C1 = torch.where(are_apart_C1 & (own_C1 >= first), own_C1, log_q_CW.shape[1]) - first
        had_one_C1 = are_apart_C1 & (other_C1 < first)
        freed_C1 = log_q_CW.gather(1, torch.where(had_one_C1, other_C1, 0)).where(had_one_C1, NOTHING)
        return _changed(log_q_CW[:, first:], gone_C1, freed_C1)


def standing_of(
    tokens_S: Tensor, others_S: Tensor, sides: tuple[Tensor, Tensor], num_pairs: int
) -> tuple[Standing, Standing]:
    """Of both sides, whose tokens `sides` are, [W] each, pairs first. ValueError for one that is no token."""
    own_S, other_S = _places(tokens_S, sides[0], "student"), _places(others_S, sides[1], "teacher")
    return (
        Standing(own_C=own_S, other_C=other_S, num_pairs=num_pairs),
        Standing(own_C=other_S, other_C=own_S, num_pairs=num_pairs),
    )


def _places(tokens_S: Tensor, side_W: Tensor, name: str) -> Tensor:
    places_S, is_other_S = places_among(tokens_S, side_W)
    if bool(is_other_S.any()):
        raise ValueError(
            f"what stands first in a stretch must be a token of its side; the {name} has "
            f"{int(tokens_S[is_other_S][0])}: give the columns of all tokens of its tokenizer"
        )
    return places_S


def places_among(columns_S: Tensor, side_W: Tensor) -> tuple[Tensor, Tensor]:
    """[S]: where these columns are among a side's tokens, and which are no token of it."""
    sorted_W, order_W = side_W.sort()
    found_S = torch.searchsorted(sorted_W, columns_S).clamp_max(len(side_W) - 1)
    return order_W[found_S], sorted_W[found_S] != columns_S


def _changed(log_q_CW: Tensor, gone: Tensor, added_C1: Tensor) -> Tensor:
    """One more column; those that are gone hold nothing, which the new one does before it is written."""
    wide = pad(log_q_CW, (0, 1), value=NOTHING).scatter_(1, gone, NOTHING)
    wide[:, -1:] = added_C1
    return wide
