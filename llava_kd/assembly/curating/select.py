"""`llava-kd data select`: which records of a stage are worth its steps, by a teacher and a smaller model.

Shape legend: R records.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llava_kd.assembly.curating.comparing import Comparison
from llava_kd.assembly.curating.scoring import Say, Scorer
from llava_kd.assembly.parts.data import open_sources
from llava_kd.assembly.parts.stored_teacher import refuse_other
from llava_kd.assembly.runs.logs import speaker
from llava_kd.assembly.runs.run_dir import locked
from llava_kd.assembly.settings import tables_of
from llava_kd.checksums import meta_checksum, sealed
from llava_kd.config import Dtype, TeacherConfig, TrainConfig
from llava_kd.curation.difference import Differences, Share, check_quotas, kept
from llava_kd.curation.disagreement import Disagreements
from llava_kd.curation.joined import FILE, Joined, groups
from llava_kd.curation.showing import examples, score_lines
from llava_kd.data.record_lists import write_lists
from llava_kd.durable import write_whole
from llava_kd.parallel.world import World, join, peers

By = Literal["difference", "disagreement"]
Found = Differences | Disagreements
CHOSEN, SCORES, TABLE, EXAMPLES, MANIFEST = (
    "chosen.json",
    "scores.jsonl",
    "table.md",
    "examples.md",
    "select.json",
)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What is asked of `select`. `teacher` None is the stage's own; `dtype` None is its `teacher.dtype`.

    `by` difference: `smaller` is the reference. By disagreement it is the student, None the stage's own.

    `group`: `file`, `folder` of the image, or a field of the records. `any_reference` goes on where the
    reference is as good as the teacher. `num_shown` examples of either end are written for a look.
    """

    share: Share
    smaller: str | None = None
    by: By = "difference"
    teacher: str | None = None
    dtype: Dtype | None = None
    group: str = FILE
    any_reference: bool = False
    num_shown: int = 20

    def __post_init__(self) -> None:
        if self.by == "difference" and self.smaller is None:
            raise ValueError("--by difference needs a small reference model; name it with --reference DIR")
        if self.by == "disagreement" and self.any_reference:
            raise ValueError("--any_reference needs --by difference; leave it out")

    @property
    def second(self) -> str:
        """What the smaller model is."""
        return "reference" if self.by == "difference" else "student"


def select(config: TrainConfig, out: str | Path, selection: Selection) -> str:
    """Score every record of the stage's data with both models, write the list of those that stay; its table.

    Every rank of a launch takes its share. The same command goes on after a kill; with another share, group
    or quota it chooses again from the scores that are there. Raises ValueError for scores of other models,
    tokenizers or data in `out`, and for a reference as good as the teacher.
    """
    if config.data.records is not None:
        raise ValueError(
            "`data.records` must be null, because the selection is made from all records; it is "
            f"{config.data.records}: set it to null"
        )
    directory = Path(out)
    teacher = _teacher(config, selection)
    smaller = replace(
        teacher,
        checkpoint=selection.smaller or _student(config),
        template=config.student.template,
        quantize=None,
        cache=None,
    )
    with peers(), ExitStack() as held:
        world = join(config.engine.device, timeout_minutes=config.engine.timeout_minutes)
        say = speaker(world)
        with world.together():
            if world.is_main:
                held.enter_context(locked(directory, "--out"))
        tables = tables_of(config)
        with world.together():
            own = [part.template for part in config.data.sources]
            source = Joined(open_sources(config.data, tables.sources), own)
            of_R = groups(source, selection.group)
            models = [
                Scorer.of(name, model, config.data, source, tables.templates)
                for name, model in (("teacher", teacher), (selection.second, smaller))
            ]
            check_quotas(of_R, selection.share)
            identity = _checked(directory, {one.name: one.identity for one in models})
        with world.together():
            if world.is_main:
                manifest = sealed({"format": 1, "identity": identity})
                write_whole(directory / MANIFEST, [json.dumps(manifest, indent=1).encode() + b"\n"])
        found = _found(selection, models, world, directory / "scores", config, say)
        with world.together():
            choice = Choice.of(found, of_R, selection, {one.name: one.identity for one in models})
            if world.is_main:
                choice.write(directory, source, say)
        return found.table(choice.rows)


def _found(
    selection: Selection, models: Sequence[Scorer], world: World, folder: Path, config: TrainConfig, say: Say
) -> Found:
    """What the models, teacher first, make of the records."""
    rows, number = config.micro_batch_size, len(models[0].source)
    if selection.by == "disagreement":
        pair = Comparison(teacher=models[0], student=models[1])
        return Disagreements(pair.compare(world, folder, config.data, rows=rows, say=say), number)
    teacher, reference = (one.score(world, folder, config.data, rows=rows, say=say) for one in models)
    alike = [models[0].identity[what] == models[1].identity[what] for what in ("tokenizer", "data.template")]
    return Differences(teacher, reference, number, same_tokens=all(alike))


def _teacher(config: TrainConfig, selection: Selection) -> TeacherConfig:
    if config.teacher is None and selection.teacher is None:
        raise ValueError("this stage has no teacher; name one with --with_teacher DIR")
    teacher = config.teacher or TeacherConfig(checkpoint=selection.teacher or "")
    return replace(
        teacher,
        checkpoint=selection.teacher or teacher.checkpoint,
        dtype=selection.dtype or teacher.dtype,
        cache=None,
    )


def _student(config: TrainConfig) -> str:
    """As it is. ValueError for a stage whose student is yet to be made."""
    if config.student.checkpoint is None:
        raise ValueError(
            "--by disagreement needs a trained student, but this stage creates a new one; name the model "
            "of the stage before with --with_student DIR"
        )
    return config.student.checkpoint


def _checked(directory: Path, identity: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """What the scores depend on, by name. ValueError, naming what differs, if the folder holds others."""
    path = directory / MANIFEST
    flat = {
        f"{name}: {what.removesuffix(' of the teacher').removeprefix('teacher.')}": value
        for name, own in identity.items()
        for what, value in own.items()
    }
    if path.is_file():
        try:
            tree = json.loads(path.read_bytes())
            there = dict(tree["identity"])
            if tree["checksum"] != meta_checksum(tree):
                raise ValueError("its checksum has changed since it was written")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be read ({error}); choose a new --out") from error
        refuse_other(
            there,
            flat,
            f"the folder {directory}",
            "choose a new --out",
        )
    elif any(not path.name.startswith(".") for path in directory.iterdir()):
        raise ValueError(f"{directory} is not empty and holds no scores of `data select`; choose a new --out")
    return flat


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was found of the records [R], and which of them stay."""

    found: Found
    is_kept_R: np.ndarray
    groups: Sequence[str]
    rows: Sequence[Any]  # those of `found`
    selection: Selection
    identity: Mapping[str, Mapping[str, str]]

    @staticmethod
    def of(
        found: Found, groups: Sequence[str], selection: Selection, identity: Mapping[str, Mapping[str, str]]
    ) -> Choice:
        is_kept_R = kept(found.score_R, groups, selection.share)
        return Choice(
            found=found,
            is_kept_R=is_kept_R,
            groups=groups,
            rows=found.rows(is_kept_R, groups),
            selection=selection,
            identity=identity,
        )

    def write(self, directory: Path, source: Joined, say: Say) -> None:
        """The tables first, the list last: where that is there, all is.

        Raises ValueError, with the tables written, where the models leave nothing to choose by.
        """
        (directory / CHOSEN).unlink(missing_ok=True)
        self._write_tables(directory, source)
        doubtful = [] if self.selection.any_reference else self.found.doubts(self.rows)
        made = {
            "method": self.found.method,
            "unit": self.found.unit,
            "selection": asdict(self.selection),
            "identity": {name: dict(own) for name, own in self.identity.items()},
            "groups": [asdict(row) for row in self.rows],
            "doubts": doubtful,
        }
        write_lists(directory / CHOSEN, source.lists(self.is_kept_R), made=made)
        for line in doubtful:
            say(f"warning: {line}")
        for line in self.found.notes():
            say(line)
        say(
            f"done: {int(self.is_kept_R.sum())} of {len(self.is_kept_R)} records were selected; train with "
            f"--data.records={directory / CHOSEN}"
        )

    def _write_tables(self, directory: Path, source: Joined) -> None:
        score_R, told = self.found.score_R, self.found
        lines = score_lines(source, self.groups, score_R, self.is_kept_R, told.line)
        write_whole(directory / SCORES, lines)
        shown = examples(source, score_R, self.groups, told.legend, count=self.selection.num_shown)
        write_whole(directory / EXAMPLES, [shown.encode("utf-8", "surrogatepass")])
        write_whole(directory / TABLE, [f"{told.table(self.rows)}\n".encode()])
