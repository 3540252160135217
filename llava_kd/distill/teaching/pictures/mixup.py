"""Partial mixup of pictures: a few of a micro-batch are blended with others, and the teacher is asked anew.

Mixup in KD, arXiv 2211.03946, where a small share of mixed pairs transfers better than all. What differs:
pairs are drawn without replacement and no picture meets itself; and as the text of a record belongs to the
picture that is blended into, only the terms that read the teacher train on it, no label does.

Shape legend: I images, C channels, H height, W width, R records, N response targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from llava_kd.batch import Batch, Counts, Inputs
from llava_kd.distill.taught import LABELLED, Taught
from llava_kd.distill.teaching.pictures.change import PictureChange
from llava_kd.distill.teaching.pictures.draws import check_ids, generator_of, records_at, records_of_images
from llava_kd.models.mllm import Prediction


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """`mixed` are numbers of images, each once; `partners` the others; `own` what is kept of the mixed."""

    mixed: tuple[int, ...]
    partners: tuple[int, ...]
    own: tuple[float, ...]


def draw_pairs(number: int, *, share: float, alpha: float, generator: np.random.Generator) -> Pairs:
    """Without replacement: no image is mixed twice, is a partner twice, or meets itself.

    Of `number` images `share` are mixed, on average where that is no whole number. What is kept is drawn
    from Beta(alpha, alpha).
    """
    count = 0 if number < 2 else int(share * number + generator.random())
    order = generator.permutation(number).tolist()
    own = generator.beta(alpha, alpha, count).tolist()
    partners = [order[(place + 1) % number] for place in range(count)]
    return Pairs(mixed=tuple(order[:count]), partners=tuple(partners), own=tuple(own))


class Mixup(PictureChange):
    """Nothing is learned: its only state is how many steps were done."""

    def __init__(self, *, share: float, alpha: float = 1.0, seed: int = 0) -> None:
        """Raises ValueError for a share outside 0 to 1, or an `alpha` that is not positive."""
        super().__init__()
        if not 0 <= share <= 1 or alpha <= 0:
            raise ValueError(
                f"mixup needs a share from 0 to 1 and a positive alpha; got share={share}, alpha={alpha}"
            )
        self._share, self._alpha, self._seed = share, alpha, seed

    def forward(self, batch: Batch) -> Batch:
        pairs = self.pairs(batch)
        if not pairs.mixed:
            return batch
        teacher = None if batch.teacher is None else _blended(batch.teacher, pairs)
        return replace(batch, student=_blended(batch.student, pairs), teacher=teacher)

    def pairs(self, batch: Batch) -> Pairs:
        """Of this micro-batch at this step: the same whenever it is asked."""
        number = batch.student.num_images
        if number < 2:
            return Pairs(mixed=(), partners=(), own=())
        check_ids(batch)
        generator = generator_of(self._seed, self.steps_done, *batch.record_ids)
        return draw_pairs(number, share=self._share, alpha=self._alpha, generator=generator)

    def label_weight(self, batch: Batch) -> Tensor | None:
        pairs = self.pairs(batch)
        if not pairs.mixed:
            return None
        inputs = batch.student
        mixed_I = torch.zeros(inputs.num_images)
        mixed_I[list(pairs.mixed)] = 1.0
        mixed_I = mixed_I.to(inputs.pixels_ICHW.device, non_blocking=True)
        mixed_R = mixed_I.new_zeros(len(batch.record_ids))
        mixed_R = mixed_R.index_add(0, records_of_images(inputs), mixed_I)
        return (mixed_R == 0).float()[records_at(inputs, inputs.places.response_N)]

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """Of cross-entropy: it stays a mean over the targets whose labels count."""
        weight_N = self.label_weight(batch)
        places_N = batch.student.places.response_N
        weight_N = torch.ones(len(places_N), device=places_N.device) if weight_N is None else weight_N
        return {LABELLED: weight_N.sum().double()}

    def figures(
        self, batch: Batch, student: Prediction, taught: Taught, counts: Counts
    ) -> Mapping[str, Tensor]:
        """The share of response targets whose labels do not count."""
        zero = torch.zeros((), device=student.hidden_BTD.device)
        weight_N = taught.label_weight_N
        masked = zero if weight_N is None else (1 - weight_N).sum()
        return {"mixed_tokens": masked / counts["response_tokens"].clamp_min(1).float()}


def _blended(inputs: Inputs, pairs: Pairs) -> Inputs:
    pixels_ICHW = inputs.pixels_ICHW
    device = pixels_ICHW.device
    mixed, partners = (torch.tensor(n).to(device, non_blocking=True) for n in (pairs.mixed, pairs.partners))
    own_I111 = torch.tensor(pairs.own).to(device, non_blocking=True).view(-1, 1, 1, 1)
    mixed_ICHW = torch.lerp(pixels_ICHW[partners].float(), pixels_ICHW[mixed].float(), own_I111)
    return replace(inputs, pixels_ICHW=pixels_ICHW.index_copy(0, mixed, mixed_ICHW.to(pixels_ICHW.dtype)))
