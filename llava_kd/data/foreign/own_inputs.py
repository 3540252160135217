"""What a processor gives beside tokens, and how that of several records becomes one batch.

No family is named here: what has a number for each token is padded like the tokens, and everything else is
laid out picture by picture, filled up with zeros where pictures are of several sizes.

Shape legend: B records, T tokens, K pictures or parts of pictures, ... whatever a family makes of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True, kw_only=True)
class OwnInputs:
    """Of one record, by the names that the model knows: `by_token` [T] each, `by_picture` [K, ...] each."""

    by_token: Mapping[str, Tensor] = field(default_factory=dict)
    by_picture: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for held in (self.by_token, self.by_picture) for t in held.values())


def stacked(records: Sequence[OwnInputs], length: int) -> dict[str, Tensor]:
    """One batch of these records, each padded to `length` tokens. Names that no record has are left out."""
    made: dict[str, Tensor] = {}
    for name, like in _named([record.by_token for record in records]).items():
        rows_BT = like.new_zeros(len(records), length)
        for b, record in enumerate(records):
            if name in record.by_token:
                rows_BT[b, : len(record.by_token[name])] = record.by_token[name]
        made[name] = rows_BT
    for name in _named([record.by_picture for record in records]):
        made[name] = _joined([r.by_picture[name] for r in records if name in r.by_picture])
    return made


def _named(held: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor for of_record in held for name, tensor in of_record.items()}


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """One after the other; what is smaller in another dimension has zeros behind it."""
    largest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    padded = []
    for part in parts:
        missing = [most - size for most, size in zip(largest, part.shape[1:], strict=True)]
        widths = [width for more in reversed(missing) for width in (0, more)]
        padded.append(pad(part, widths) if any(missing) else part)
    return torch.cat(padded)
