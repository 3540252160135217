"""`llava-kd data select`: which records of a stage are worth its steps, by a teacher and a small reference.

Shape legend: R records.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from llava_kd.assembly.curating.scoring import Say, Scorer
from llava_kd.assembly.parts.data import open_sources
from llava_kd.assembly.parts.stored_teacher import refuse_other
from llava_kd.assembly.runs.logs import speaker
from llava_kd.assembly.runs.run_dir import locked
from llava_kd.assembly.settings import tables_of
from llava_kd.checksums import meta_checksum, sealed
from llava_kd.config import Dtype, TeacherConfig, TrainConfig
from llava_kd.curation.difference import GroupRow, Share, check_quotas, doubts, group_rows, kept, table
from llava_kd.curation.joined import FILE, Joined, groups
from llava_kd.curation.likelihoods import Likelihood
from llava_kd.curation.showing import examples, score_lines
from llava_kd.data.record_lists import write_lists
from llava_kd.durable import write_whole
from llava_kd.parallel.world import join, peers

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

    `group`: `file`, `folder` of the image, or a field of the records. `any_reference` goes on where the
    reference is as good as the teacher. `num_shown` examples of either end are written for a look.
    """

    reference: str
    share: Share
    teacher: str | None = None
    dtype: Dtype | None = None
    group: str = FILE
    any_reference: bool = False
    num_shown: int = 20


def select(config: TrainConfig, out: str | Path, selection: Selection) -> str:
    """Score every record of the stage's data with both models, write the list of those that stay; its table.

    Every rank of a launch takes its share. The same command goes on after a kill; with another share, group
    or quota it chooses again from the scores that are there. Raises ValueError for scores of other models,
    tokenizers or data in `out`, and for a reference as good as the teacher.
    """
    if config.data.records is not None:
        raise ValueError(
            f"`data.records` is {config.data.records}, and a choice is made from all records; set it to null"
        )
    directory = Path(out)
    teacher = _teacher(config, selection)
    reference = replace(
        teacher, checkpoint=selection.reference, template=config.student.template, quantize=None, cache=None
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
                for name, model in (("teacher", teacher), ("reference", reference))
            ]
            check_quotas(of_R, selection.share)
            identity = _checked(directory, {one.name: one.identity for one in models})
        with world.together():
            if world.is_main:
                manifest = sealed({"format": 1, "identity": identity})
                write_whole(directory / MANIFEST, [json.dumps(manifest, indent=1).encode() + b"\n"])
        rows = config.micro_batch_size
        scores = [one.score(world, directory / "scores", config.data, rows=rows, say=say) for one in models]
        with world.together():
            choice = Choice.of(models, scores, of_R, selection)
            if world.is_main:
                choice.write(directory, source, say)
        return table(choice.rows, choice.unit)


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
                raise ValueError("it has another checksum than when it was written")
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
    """Mean -log p [R] a `unit` of each model, NaN for a bad record, and what stays."""

    unit: str
    teacher_R: np.ndarray
    reference_R: np.ndarray
    is_kept_R: np.ndarray
    groups: Sequence[str]
    scores: tuple[Mapping[int, Likelihood], ...]
    rows: Sequence[GroupRow]
    selection: Selection
    identity: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    num_cut: int = 0

    @staticmethod
    def of(
        models: Sequence[Scorer],
        scores: Sequence[Mapping[int, Likelihood]],
        groups: Sequence[str],
        selection: Selection,
    ) -> Choice:
        """By tokens where both models read the same ones, else by characters."""
        same = all(
            models[0].identity[what] == models[1].identity[what] for what in ("tokenizer", "data.template")
        )
        unit = "tokens" if same else "characters"
        teacher_R, reference_R = np.full((2, len(groups)), np.nan)
        num_cut = 0
        for number in scores[0].keys() & scores[1].keys():
            told, guessed = scores[0][number], scores[1][number]
            if told.characters != guessed.characters:
                num_cut += 1  # cut off at different places by max_length: not about the same text
                continue
            teacher_R[number], reference_R[number] = told.mean(unit), guessed.mean(unit)
        is_kept_R = kept(reference_R - teacher_R, groups, selection.share)
        rows = group_rows(teacher_R, reference_R, is_kept_R, groups)
        return Choice(
            unit=unit,
            teacher_R=teacher_R,
            reference_R=reference_R,
            is_kept_R=is_kept_R,
            groups=groups,
            scores=tuple(scores),
            rows=rows,
            selection=selection,
            identity={one.name: one.identity for one in models},
            num_cut=num_cut,
        )

    def write(self, directory: Path, source: Joined, say: Say) -> None:
        """The tables first, the list last: where that is there, all is.

        Raises ValueError, with the tables written, for a reference as good as the teacher.
        """
        (directory / CHOSEN).unlink(missing_ok=True)
        self._write_tables(directory, source)
        doubtful = [] if self.selection.any_reference else doubts(self.rows)
        made = {
            "method": "difference sampling, arXiv 2410.17215",
            "unit": self.unit,
            "selection": asdict(self.selection),
            "identity": {name: dict(own) for name, own in self.identity.items()},
            "groups": [asdict(row) for row in self.rows],
            "doubts": doubtful,
        }
        write_lists(directory / CHOSEN, source.lists(self.is_kept_R), made=made)
        for line in doubtful:
            say(f"warning: {line}")
        if self.num_cut:
            say(
                f"{self.num_cut} records are cut off by data.max_length at different places for the two "
                "models and are counted as bad; raise data.max_length"
            )
        if self.unit == "characters":
            say("the models read different tokens: means are over the characters of the answers")
        say(
            f"done: {int(self.is_kept_R.sum())} of {len(self.is_kept_R)} records stay; train with "
            f"--data.records={directory / CHOSEN}"
        )

    def _write_tables(self, directory: Path, source: Joined) -> None:
        means = (self.teacher_R, self.reference_R)
        lines = score_lines(source, self.groups, means, self.is_kept_R, self.scores)
        write_whole(directory / SCORES, lines)
        score_R = self.reference_R - self.teacher_R
        shown = examples(source, score_R, self.groups, count=self.selection.num_shown)
        write_whole(directory / EXAMPLES, [shown.encode("utf-8", "surrogatepass")])
        write_whole(directory / TABLE, [f"{table(self.rows, self.unit)}\n".encode()])
