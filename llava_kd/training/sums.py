"""Figures summed over ranks by their names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llava_kd.parallel.world import World


class Sums:
    """One sum over ranks a call. The names of each kind of figures are agreed on at its first call."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._names: dict[str, tuple[str, ...]] = {}

    def __call__(self, values: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
        """`what` the figures are, in the plural. All ranks call with the same kinds in the same order.

        Raises ValueError where ranks report different figures, or this one others than at first.
        """
        if what not in self._names:
            self._names[what] = self._world.agreed_names(values.keys(), what)
        names = self._names[what]
        if different := sorted(values.keys() ^ set(names)):
            shown = [f"{name} is {'new' if name in values else 'missing'}" for name in different]
            raise ValueError(
                f"rank {self._world.rank} must report the same {what} at every step, but {', '.join(shown)}; "
                "report it always, as zero where a batch has nothing for it"
            )
        summed = self._world.sum(torch.stack([values[name] for name in names]))
        return dict(zip(names, summed.unbind(), strict=True))
