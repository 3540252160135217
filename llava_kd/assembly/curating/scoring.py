"""What a model makes of the answers of records: one pass by all ranks, gone on with after a kill."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llava_kd.assembly.parts.data import side_of
from llava_kd.assembly.parts.models import DTYPES
from llava_kd.assembly.parts.stored_teacher import identity
from llava_kd.assembly.parts.teacher import placed_teacher
from llava_kd.assembly.record_pass import RecordPass, answer_rows
from llava_kd.config import DataConfig, TeacherConfig
from llava_kd.curation.likelihoods import Likelihood, Likelihoods, answer_sums, characters
from llava_kd.curation.score_files import Row, ScoreFiles, missing
from llava_kd.data.batches.model_side import Side
from llava_kd.data.sources.conversation import Source
from llava_kd.data.text.template import Template
from llava_kd.models.files.checkpoint import load_config, load_processor, load_stock
from llava_kd.parallel.world import World

Say = Callable[[str], None]


def scored(
    stored: ScoreFiles[Row],
    records: RecordPass,
    num_records: int,
    write: Callable[[RecordPass, list[int]], None],
    name: str,
    say: Say,
) -> dict[int, Row]:
    """What `write` stores of every record that is not bad, by number; those on disk are not read again."""
    world = records.world
    with world.together():
        if world.is_main:
            stored.begin()
    with world.together():
        todo = missing(stored.read(), num_records)
    say(f"{name}: {num_records - len(todo)} of {num_records} records are scored")
    if todo:
        with world.together():
            write(records, todo)
    with world.together():
        found = stored.read()
    return found


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """One model, `name` it for people and files, and how it reads the records of `source`."""

    name: str
    model: TeacherConfig
    reader: Side
    source: Source
    identity: Mapping[str, str]

    @staticmethod
    def of(
        name: str, model: TeacherConfig, data: DataConfig, source: Source, templates: Mapping[str, Template]
    ) -> Scorer:
        """Reads no weights into memory. Raises ValueError for a model or template that cannot be used."""
        processor, config = load_processor(model.checkpoint), load_config(model.checkpoint)
        reader = side_of(processor, config, data, model.template, templates=templates)
        return Scorer(
            name=name, model=model, reader=reader, source=source, identity=identity(model, reader, source)
        )

    def score(
        self, world: World, folder: Path, data: DataConfig, *, rows: int, say: Say
    ) -> dict[int, Likelihood]:
        """Of every record that is not bad, by number; those on disk are not read again."""
        stored = Likelihoods(folder, self.name)
        begun = RecordPass(world=world, rows=rows, settings=data, bad_records=folder / "bad_records.jsonl")
        return scored(stored, begun, len(self.source), partial(self._write, stored), self.name, say)

    def _write(self, stored: Likelihoods, records: RecordPass, todo: list[int]) -> None:
        world = records.world
        parts = load_stock(self.model.checkpoint, dtype=DTYPES[self.model.dtype])
        predict = placed_teacher(self.model, world, parts, shares_tower=False)
        encoder = self.reader.encoder()
        for batch, numbers, own in records.batches(todo, self.source, self.reader):
            sums = answer_sums(answer_rows(predict(batch), batch), batch.student)
            lines = [
                Likelihood(
                    number=number,
                    id=record_id,
                    nll=nll,
                    tokens=tokens,
                    characters=characters(encoder(self.source.record(number))),
                )
                for number, record_id, (nll, tokens) in zip(numbers, batch.record_ids, sums, strict=True)
                if number in own and tokens  # a bad record has none
            ]
            stored.append(world.rank, lines)
