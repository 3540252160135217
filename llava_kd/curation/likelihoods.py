"""What a model makes of the answers of records: how likely it finds them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llava_kd.batch import IGNORE_INDEX, Inputs
from llava_kd.curation.score_files import Scored, ScoreFiles
from llava_kd.data.text.encoder import Encoded


@dataclass(frozen=True, kw_only=True)
class Likelihood(Scored):
    """One record as a model reads it: `nll` is the sum of -log p over its answers' `tokens`.

    `characters` of its answers stand in those tokens: fewer than it has where its end was cut off. `crc` is
    of its id and tokens.
    """

    nll: float
    tokens: int
    characters: int

    def __post_init__(self) -> None:
        if not math.isfinite(self.nll) or self.tokens < 1 or self.number < 0:
            raise ValueError(
                f"record {self.id!r}: its likelihood must be finite, over one token or more; got {self.nll} "
                f"over {self.tokens}: the model computes invalid numbers here; try --dtype float32"
            )

    def mean(self, unit: str) -> float:
        """Mean of -log p a token, or a character."""
        return self.nll / (self.tokens if unit == "tokens" else max(self.characters, 1))


def answer_sums(rows_N: Tensor, inputs: Inputs) -> list[tuple[float, int]]:
    """-log p of each row's answers, and their tokens; `rows_N` [N] is at `inputs.places.response_N`.

    Sums are in fp64. A row without a target, as that of a bad record, has (0.0, 0).
    """
    targets_BT = inputs.targets_BT != IGNORE_INDEX
    row_N = inputs.places.response_N.cpu() // targets_BT.shape[1]
    sums_B = torch.zeros(len(targets_BT), dtype=torch.float64)
    sums_B.index_add_(0, row_N, rows_N.detach().double().cpu())
    return list(zip(sums_B.tolist(), targets_BT.sum(1).tolist(), strict=True))


def characters(encoded: Encoded) -> int:
    """How many characters of a record's answers its targets reach; the end token has none.

    By the furthest place in each answer, since the tokens of one emoji all cover the whole of it.
    """
    spans = encoded.spans[encoded.labels != IGNORE_INDEX].tolist()
    reached: dict[int, int] = {}
    for answer, _, last, _ in spans:
        reached[answer] = max(reached.get(answer, 0), last)
    return sum(reached.values())


class Likelihoods(ScoreFiles[Likelihood]):
    """The files of one model in a folder."""

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__(folder, name, Likelihood)
