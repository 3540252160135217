"""A watch over a run that could lose what its model knew: it stops the run, and says so."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

KEEPS = 0.9  # of the running mean at a step: about the last ten of them count


class Collapse:
    """Called with the global figures of every step; ValueError where cross-entropy has left `before` behind.

    A running mean that starts from `before`, the mean of the model as it came, so that one hard batch stops
    nothing, and a run that goes on from a checkpoint is measured by the same.
    """

    def __init__(self, *, before: float, margin: float, advice: str) -> None:
        self._before, self._margin, self._advice = before, margin, advice
        self._mean = before

    def __call__(self, means: Mapping[str, Tensor]) -> None:
        self._mean = KEEPS * self._mean + (1 - KEEPS) * float(means["cross_entropy"])
        if self._mean > self._before + self._margin:
            raise ValueError(
                "the model unlearns its answers: their cross-entropy, a running mean over steps, is "
                f"{self._mean:.3f} nats a token, more than {self._margin:g} above the {self._before:.3f} "
                f"that it started with. {self._advice}"
            )
