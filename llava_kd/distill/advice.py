"""What the log of a run says against its settings: terms that hardly pull, terms with nothing to say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from llava_kd.distill.diagnosis import SHARE, measured
from llava_kd.distill.terms.term import Term

LEAST_SHARE = 0.01
STEPS = 100  # of a small gradient, and of a value that does not move
FIRST, LAST = 20, 80  # a value at the start is one up to FIRST, one at the end of STEPS one after LAST
MOVED = 0.5  # a value has moved that fell to this share of what it was


class Advice:
    """Shown the figures of every logged step, in order; each warning comes at most once a process.

    A process that goes on from a checkpoint counts its steps anew, and says nothing of a start that it did
    not see.
    """

    def __init__(self, terms: Mapping[str, Term]) -> None:
        self._terms = {name: term for name, term in terms.items() if term.weight > 0}
        self._is_compared = len(measured(terms)) > 1
        self._small_since: dict[str, int] = {}
        self._values: dict[str, list[tuple[int, float]]] = {}
        self._decided: set[str] = set()  # whether they are saturated
        self._said: set[str] = set()  # that their gradient is small

    def __call__(self, done: int, figures: Mapping[str, Tensor]) -> Iterator[str]:
        """The lines for the user after step `done`, from 1, given its global figures by their names."""
        for name, term in self._terms.items():
            share = figures.get(f"{SHARE}{name}")
            if self._is_compared and share is not None and self._is_small(name, done, float(share)):
                yield (
                    f"{name} is under {LEAST_SHARE:.0%} of the gradient for {STEPS} steps, now "
                    f"{float(share):.2%} at step {done}: it hardly moves the student. Raise "
                    f"objective.{name}.weight, or set objective.{name} to null to save its time"
                )
            saturation = None if name in self._decided else term.saturation()
            if saturation is not None and name in figures:
                values = self._values.setdefault(name, [])
                values.append((done, float(figures[name])))
                if self._is_saturated(name, saturation.below):
                    yield (
                        f"{name} is saturated from the start: {values[0][1]:.4f} at step {values[0][0]} and "
                        f"{values[-1][1]:.4f} at step {done}, where 0 means equal, so it has little to "
                        f"teach. In objective.{name}: {saturation.remedy}"
                    )

    def _is_small(self, name: str, done: int, share: float) -> bool:
        if share >= LEAST_SHARE:
            self._small_since.pop(name, None)
            return False
        since = self._small_since.setdefault(name, done)
        if since == done or done - since + 1 < STEPS or name in self._said:
            return False
        self._said.add(name)
        return True

    def _is_saturated(self, name: str, below: float) -> bool:
        values = self._values[name]
        if values[-1][0] < STEPS:
            return False
        self._decided.add(name)  # either way: nothing more is kept of it, nor fetched from the device
        first = [value for step, value in values if step <= FIRST]
        last = [value for step, value in values if step > LAST]
        if not first:
            return False
        begins, ends = (sum(some) / len(some) for some in (first, last))
        return begins < below and ends > MOVED * begins
