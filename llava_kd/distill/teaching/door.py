"""The one door to whoever teaches: what a step may ask, and the answers of a run that has no teacher.

Shape legend: I images, N tokens of an image, E tower width.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from llava_kd.batch import Batch, Counts
from llava_kd.distill.taught import Taught
from llava_kd.models.mllm import Prediction


class Teaching:
    """Whoever teaches answers here. The base has no teacher; a method overrides the answers that it has.

    For each micro-batch the student asks, in this order: `outside`, before the engine's forward and without
    gradient; then, within the wrapped forward and with gradient, `pictures` (where `changes_pictures`),
    `inside` and `losses`; at last, at steps that are logged, `figures`. All ranks ask equally often.
    """

    changes_pictures: bool = False
    """Whether `pictures` is asked, and so the student's tower runs within the forward, behind it."""

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """Denominators of its own, by names of its own: of a micro-batch as it came, before any forward."""
        del batch
        return {}

    def modules(self) -> nn.Module | None:
        """What is trained with the student: wrapped, sharded and saved with it, without weight in its export.

        Its parameters that require a gradient are trained, its persistent buffers are saved and must be the
        same on every rank. Sharded weights are whole only in a module's own `forward`: call modules, do not
        read their parameters. A frozen teacher is no such module and stays out of every tree.
        """
        return None

    def outside(self, batch: Batch, features_INE: Tensor | None) -> Taught:
        """What is said without gradient. The features are the student's, None where its tower runs inside."""
        del batch, features_INE
        return Taught()

    def pictures(self, batch: Batch) -> Batch:
        """The batch with other pixels, for both models; gradient may flow to what changed them."""
        return batch

    def inside(self, batch: Batch, student: Prediction, features_INE: Tensor, taught: Taught) -> Taught:
        """What was said outside, and what only the student's own prediction or a gradient can add."""
        del batch, student, features_INE
        return taught

    def losses(
        self, batch: Batch, student: Prediction, taught: Taught, counts: Counts
    ) -> tuple[Tensor, Mapping[str, Tensor]] | None:
        """A loss beside the objective's, as of a peer that learns too, and its means for the log.

        Both divided by `counts`, so that sums over micro-batches and ranks are the step's.
        """
        del batch, student, taught, counts
        return None

    def figures(self, batch: Batch, taught: Taught, counts: Counts) -> Mapping[str, Tensor]:
        """Means of the teacher's own for the log, without gradient; the names are the same at every call."""
        del batch, taught, counts
        return {}

    def after_step(self, means: Mapping[str, Tensor]) -> None:
        """The global means of a step whose weights have moved: where what no engine moves is moved.

        Every rank gets the same, once a step, before anything of the step is saved.
        """
        del means

    def advice(self, means: Mapping[str, Tensor]) -> str | None:
        """A line for the user after a step with these global means; None where there is nothing to say."""
        del means
        return None


class Around(Teaching):
    """Answers as `inner` does; what stands around it overrides the answers that it changes."""

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
