"""How far two models are from each other at the answers of records: one pass of both by all ranks.

Shape legend: N response rows, B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from llava_kd.assembly.curating.scoring import Say, Scorer, scored
from llava_kd.assembly.parts.models import DTYPES
from llava_kd.assembly.parts.teacher import placed_teacher
from llava_kd.assembly.record_pass import RecordPass
from llava_kd.batch import Batch
from llava_kd.config import DataConfig
from llava_kd.curation.disagreement import Disagreement
from llava_kd.curation.score_files import ScoreFiles
from llava_kd.distill.rows import Rows
from llava_kd.losses.divergence import Divergence
from llava_kd.losses.head_loss import head_loss
from llava_kd.losses.row_figures import row_figures
from llava_kd.models.files.checkpoint import load_stock
from llava_kd.models.mllm import Prediction
from llava_kd.models.vocabulary import num_common_columns
from llava_kd.parallel.world import World

NAME = "disagreement"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Of two readers of one source."""

    teacher: Scorer
    student: Scorer

    def compare(
        self, world: World, folder: Path, data: DataConfig, *, rows: int, say: Say
    ) -> dict[int, Disagreement]:
        """Of every record that is not bad, by number; those on disk are not read again.

        Raises ValueError for models whose tokens differ.
        """
        stored, source = ScoreFiles(folder, NAME, Disagreement), self.student.source
        begun = RecordPass(world=world, rows=rows, settings=data, bad_records=folder / "bad_records.jsonl")
        return scored(stored, begun, len(source), partial(self._write, stored), NAME, say)

    def _write(self, stored: ScoreFiles[Disagreement], records: RecordPass, todo: list[int]) -> None:
        world = records.world
        sides = self.student, self.teacher
        parts = [load_stock(one.model.checkpoint, dtype=DTYPES[one.model.dtype]) for one in sides]
        num_common = num_common_columns(
            *(one.processor.tokenizer for one in parts),
            student_rows=parts[0].stock.lm_head.weight.shape[0],
            teacher_rows=parts[1].stock.lm_head.weight.shape[0],
        )
        student, teacher = (
            placed_teacher(one.model, world, its, shares_tower=False)
            for one, its in zip(sides, parts, strict=True)
        )
        readers = [one.reader for one in sides]
        for batch, numbers, own in records.batches(todo, self.student.source, *readers):
            # A "teacher" reads the teacher's side where there is one; the student's own is its only one.
            said = student(Batch(student=batch.student, record_ids=batch.record_ids)), teacher(batch)
            sums = _by_record(*divergences(batch, *said, num_common=num_common), batch)
            stored.append(
                world.rank,
                [
                    Disagreement(number=number, id=name, **one)
                    for number, name, one in zip(numbers, batch.record_ids, sums, strict=True)
                    if number in own and one["tokens"]  # a bad record has none
                ],
            )


@torch.no_grad()
def divergences(
    batch: Batch, student: Prediction, teacher: Prediction, *, num_common: int
) -> tuple[Tensor, Tensor, Rows]:
    """JSD [N] in nats of each response row over the common columns, where the likeliest differ, the rows."""
    rows = Rows.select("response", batch, with_teacher=True)
    student_ND = student.hidden_BTD.flatten(0, 1)[rows.student_N]
    teacher_NE = teacher.hidden_BTD.flatten(0, 1)[rows.teacher_N]
    if len(student_ND) == 0:
        return student_ND.new_zeros(0), student_ND.new_zeros(0), rows
    ones_N = torch.ones(len(student_ND), device=student_ND.device)
    found = head_loss(
        student_ND,
        student.head_VD,
        rows.targets_N,
        ce_weight_N=torch.zeros_like(ones_N),
        student_bias_V=student.bias_V,
        teacher_NE=teacher_NE,
        teacher_head_UE=teacher.head_VD,
        teacher_bias_U=teacher.bias_V,
        student_cap=student.cap,
        teacher_cap=teacher.cap,
        kl_weight_N=ones_N,
        divergence=Divergence("jsd", 0.5),
        num_common=num_common,
        active_rows=(len(student_ND), 0),
    )
    choice_N, other_N = (
        row_figures(
            hidden_NX, one.head_VD, one.bias_V, rows.targets_N, num_common=num_common, cap=one.cap
        ).choice_N
        for hidden_NX, one in ((student_ND, student), (teacher_NE, teacher))
    )
    return found.kl_N.clamp_min(0), (choice_N != other_N).float(), rows


def _by_record(divergence_N: Tensor, is_other_N: Tensor, rows: Rows, batch: Batch) -> list[Mapping]:
    """Sums of each row of the batch, in fp64, over the tokens that both sides answer with."""
    num_rows, length = batch.student.labels_BT.shape
    row_N = rows.student_N.cpu() // length
    kept_N = rows.is_shared_N.double().cpu()

    def sums(value_N: Tensor) -> list[float]:
        zeros_B = torch.zeros(num_rows, dtype=torch.float64)
        return zeros_B.index_add_(0, row_N, value_N.double().cpu() * kept_N).tolist()

    columns = zip(sums(divergence_N), sums(is_other_N), sums(torch.ones_like(divergence_N)), strict=True)
    return [{"divergence": total, "other": int(other), "tokens": int(n)} for total, other, n in columns]
