"""One pass of a model over records, shared by ranks; neither kills nor their number change a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llava_kd.batch import Batch
from llava_kd.config import DataConfig
from llava_kd.data.batches.loader import Loader
from llava_kd.data.batches.model_side import AnySide
from llava_kd.data.batches.order import Order, Reading
from llava_kd.data.sources.conversation import Source
from llava_kd.losses.head_loss import head_loss
from llava_kd.models.mllm import Prediction
from llava_kd.parallel.world import World


@dataclass(frozen=True, kw_only=True)
class RecordPass:
    """`rows` records a batch. Bad records are named in `bad_records` and stop the pass as they stop a run."""

    world: World
    rows: int
    settings: DataConfig
    bad_records: Path

    def batches(
        self, todo: Sequence[int], source: Source, reader: AnySide, teacher: AnySide | None = None
    ) -> Iterator[tuple[Batch, Sequence[int], set[int]]]:
        """This rank's share: every world-size-th batch, its record numbers, and which of them are its to do.

        A batch is `rows` records that follow each other in the data, also where some of them are done
        already: what a model says rounds with the company that a record is in. Each rank makes as many
        batches as the others, which a model that is spread over them needs: one that has a batch less
        repeats the first, of which nothing is its to do. With `teacher` a batch has that side too.
        """
        numbers_todo, rows = set(todo), self.rows
        blocks = sorted({number // rows for number in todo})
        own = blocks[self.world.rank :: self.world.size]
        repeated = blocks[:1] * (-(-len(blocks) // self.world.size) - len(own))
        # The last batch of the data may be short, so it stays last.
        order = [n for b in (*repeated, *own) for n in range(b * rows, min((b + 1) * rows, len(source)))]
        loader = self._loader(order, source, reader, teacher)
        for step, batches in enumerate(loader.batches(0, loader.steps_per_epoch)):
            numbers = order[step * rows : (step + 1) * rows]
            is_own = step >= len(repeated)
            yield batches[0], numbers, numbers_todo.intersection(numbers) if is_own else set()

    def _loader(
        self, order: Sequence[int], source: Source, reader: AnySide, teacher: AnySide | None
    ) -> Loader:
        return Loader(
            source=source,
            student=reader,
            teacher=teacher,
            order=Order(seed=0, global_batch_size=self.rows, micro_batch_size=self.rows, records=order),
            reading=Reading(
                num_workers=self.settings.num_workers,
                max_bad_rate=self.settings.max_bad_rate,
                bad_records_path=self.bad_records,
            ),
            device=self.world.device,
        )


def answer_rows(prediction: Prediction, batch: Batch) -> torch.Tensor:
    """-log p [N] of each answer token of a batch, at `places.response_N`."""
    places_N = batch.student.places.response_N
    hidden_ND = prediction.hidden_BTD.flatten(0, 1)[places_N]
    if not len(places_N):
        return hidden_ND.new_zeros(0)
    with torch.no_grad():
        return head_loss(
            hidden_ND,
            prediction.head_VD,
            batch.student.targets_BT.flatten()[places_N],
            ce_weight_N=torch.ones(len(places_N), device=hidden_ND.device),
            student_bias_V=prediction.bias_V,
            student_cap=prediction.cap,
        ).ce_N
