"""Which characters of which answer each target token covers: see `Encoded.spans`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def target_spans(
    answers: Sequence[tuple[int, int, int]], is_target: Sequence[bool], offsets: Sequence[tuple[int, int]]
) -> Tensor:
    """One row a token, zeros for what is no target.

    `answers`: of each, where its segment of the text ends, and where its own words begin and end.
    """
    rows, k = [], 0
    for (start, stop), target in zip(offsets, is_target, strict=True):
        if not target:
            rows.append((0, 0, 0, 0))
            continue
        while start >= answers[k][0]:
            k += 1
        _, begin, end = answers[k]
        first, last = (min(max(place, begin), end) - begin for place in (start, stop))
        rows.append((k, first, last, int(start < begin or stop > end)))
    return torch.tensor(rows, dtype=torch.int32)
