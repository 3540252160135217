"""The interface of all teaching: what a training step calls, and the defaults of a run without a teacher.

Shape legend: I images, N tokens of an image, E tower width.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from llava_kd.batch import Batch, Counts
from llava_kd.distill.taught import Taught
from llava_kd.models.mllm import Prediction


class Teaching:
    """The interface of a teacher. The base class has no teacher; a subclass overrides what it provides.

    For each micro-batch the training step calls, in this order: `outside`, before the engine's forward and
    without gradient; then, within the wrapped forward and with gradient, `pictures` (if `changes_pictures`),
    `inside` and `losses`; last, at logged steps, `figures`. All ranks make the same number of calls.
    """

    changes_pictures: bool = False
    """Whether `pictures` is called; then the student's tower runs within the forward, after it."""

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """Its own denominators by name, counted on an unchanged micro-batch, before any forward."""
        del batch
        return {}

    def modules(self) -> nn.Module | None:
        """What is trained with the student: wrapped, sharded and saved with it, but not exported.

        Parameters that require a gradient are trained. Persistent buffers are saved and must be the same on
        every rank. Sharded weights are whole only in a module's own `forward`: call modules, do not read
        their parameters. Do not return a frozen teacher: it is neither wrapped nor saved.
        """
        return None

    def outside(self, batch: Batch, features_INE: Tensor | None) -> Taught:
        """What is computed without gradient. `features_INE`: the student's; None if its tower runs inside."""
        del batch, features_INE
        return Taught()

    def pictures(self, batch: Batch) -> Batch:
        """The batch with changed pixels, for both models; a gradient may flow to what changed them."""
        return batch

    def inside(self, batch: Batch, student: Prediction, features_INE: Tensor, taught: Taught) -> Taught:
        """`taught` of `outside`, plus what needs the student's own prediction or a gradient."""
        del batch, student, features_INE
        return taught

    def losses(
        self, batch: Batch, student: Prediction, taught: Taught, counts: Counts
    ) -> tuple[Tensor, Mapping[str, Tensor]] | None:
        """A loss in addition to the objective's, such as that of a trained peer, and its means for the log.

        Divide both by `counts`, so that their sums over micro-batches and ranks are those of the step.
        """
        del batch, student, taught, counts
        return None

    def figures(self, batch: Batch, taught: Taught, counts: Counts) -> Mapping[str, Tensor]:
        """The teacher's own means for the log, without gradient; every call must return the same names."""
        del batch, taught, counts
        return {}

    def after_step(self, means: Mapping[str, Tensor]) -> None:
        """Called with the global means after the weights are updated: update here what no engine updates.

        Every rank gets the same means, once a step, before anything of the step is saved.
        """
        del means

    def advice(self, means: Mapping[str, Tensor]) -> str | None:
        """A line for the user after a step with these global means; None if there is none."""
        del means
        return None


class Around(Teaching):
    """Forwards every call to `inner`; a subclass overrides what it changes."""

    def __init__(self, inner: Teaching) -> None:
        self._inner = inner
        self.changes_pictures = inner.changes_pictures

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        return self._inner.counts(batch)

    def modules(self) -> nn.Module | None:
        return self._inner.modules()

    def outside(self, batch: Batch, features_INE: Tensor | None) -> Taught:
        return self._inner.outside(batch, features_INE)

    def pictures(self, batch: Batch) -> Batch:
        return self._inner.pictures(batch)

    def inside(self, batch: Batch, student: Prediction, features_INE: Tensor, taught: Taught) -> Taught:
        return self._inner.inside(batch, student, features_INE, taught)

    def losses(
        self, batch: Batch, student: Prediction, taught: Taught, counts: Counts
    ) -> tuple[Tensor, Mapping[str, Tensor]] | None:
        return self._inner.losses(batch, student, taught, counts)

    def figures(self, batch: Batch, taught: Taught, counts: Counts) -> Mapping[str, Tensor]:
        return self._inner.figures(batch, taught, counts)

    def after_step(self, means: Mapping[str, Tensor]) -> None:
        self._inner.after_step(means)

    def advice(self, means: Mapping[str, Tensor]) -> str | None:
        return self._inner.advice(means)
