"""`llava-kd data answer`: models write answers and questions, filter and pair them, with their origin."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from llava_kd.assembly.curating.scoring import Scorer
from llava_kd.assembly.plugins import OURS, Tables
from llava_kd.assembly.runs.logs import speaker
from llava_kd.assembly.runs.run_dir import locked
from llava_kd.config import DataConfig, Dtype, TeacherConfig
from llava_kd.curation.difference import Share, kept
from llava_kd.curation.elicit.entries import Asked, Dropped, Which, read_asked
from llava_kd.curation.elicit.making import Asking, Made, agreeing, expand, label, read_prompts
from llava_kd.curation.elicit.pairs import paired, sampled
from llava_kd.data.sources.kinds import Place, open_source
from llava_kd.durable import write_whole
from llava_kd.evaluation.answers import claim
from llava_kd.evaluation.generation.model_directory import model_directory
from llava_kd.evaluation.generation.ranks import Ranks
from llava_kd.evaluation.generation.writing import Writing
from llava_kd.evaluation.runner import Model, model_fingerprint
from llava_kd.parallel.world import World, join, peers

_TIMEOUT_MINUTES = 24 * 60.0  # ranks finish their parts of the questions at different times


@dataclass(frozen=True, kw_only=True)
class Answering:
    """What every way of eliciting is told. `images` None: the folder of `data`; `dtype` None: the best."""

    data: str
    out: str
    model: str
    images: str | None = None
    follow_symlinks: bool = False
    batch_size: int = 32
    max_new_tokens: int = 256
    writing: Writing = field(default_factory=lambda: Writing(marks_cut=True))
    dtype: Dtype | None = None
    device: str = "auto"
    max_length: int = 2048


def label_data(asked: Answering, *, relabel: bool = False) -> str:
    """Answers for the questions that stand open; with `relabel` for all answers of every record anew."""

    def work(run: Run) -> tuple[Made, Mapping[str, object]]:
        records, dropped = run.read("all" if relabel else "open")
        asking = run.asking(asked.model)
        made = label(asking, records, run.out)
        return _with(made, dropped), asking.provenance("label", "the records' own questions")

    return elicit(asked, work)


def expand_data(asked: Answering, prompts: str) -> str:
    """New questions about the images of the data, by the prompts of a file; they have no answers yet."""

    def work(run: Run) -> tuple[Made, Mapping[str, object]]:
        asking = run.asking(asked.model)
        made = expand(
            asking,
            asked.data,
            read_prompts(prompts),
            run.out,
            image_root=asked.images,
            follow_symlinks=asked.follow_symlinks,
        )
        return made, asking.provenance("expand", f"those of {prompts}")

    return elicit(asked, work)


def agree_data(asked: Answering) -> str:
    """The records whose answers this model gives too."""

    def work(run: Run) -> tuple[Made, Mapping[str, object]]:
        records, dropped = run.read("all")
        asking = run.asking(asked.model)
        made = agreeing(asking, records, run.out)
        return _with(made, dropped), asking.provenance("agreement", "the records' own questions")

    return elicit(asked, work)


def likely_data(asked: Answering, *, keep: float | None, least: float | None) -> str:
    """The records whose answers this model finds likeliest: a share of them, or all from a mean log p on."""
    if (keep is None) == (least is None):
        raise ValueError(
            "--by likelihood needs either --keep (a share of the records) or --least (a mean log p per "
            "token); give one of them"
        )
    share = None if keep is None else Share(keep=keep)

    def work(run: Run) -> tuple[Made, Mapping[str, object]]:
        records, dropped = run.read("all")
        scores = run.scores(Path(asked.data), asked.images)
        score_R = np.array([scores.get(one.record.id, np.nan) for one in records])
        is_kept_R = score_R >= least if share is None else kept(score_R, ["the data"] * len(score_R), share)
        origin = {
            **run.asking(asked.model).provenance("likelihood", "the records' own questions"),
            "settings": {"keep": keep, "least": least, "dtype": run.dtype},
        }
        entries = []
        for one, score, stays in zip(records, score_R.tolist(), is_kept_R.tolist(), strict=True):
            if stays:
                answers = [question.truth for question in one.questions]
                entries.append(one.entry(answers, {**origin, "log_p": score}))
            else:
                why = (
                    f"mean log p of its answers is {score:.3f}" if score == score else "it could not be read"
                )
                dropped.append(Dropped(id=one.record.id, reason=why))
        return Made(entries=entries, dropped=dropped), origin

    return elicit(asked, work)


def feedback_data(asked: Answering, student: str, *, samples: int, margin: float) -> str:
    """Pairs of a student's answers, the better first, by the mean log p that `asked.model` gives them."""
    if asked.writing.is_greedy or samples < 2:
        raise ValueError(
            "feedback needs different answers; set --temperature above 0 and --samples to 2 or more"
        )

    def work(run: Run) -> tuple[Made, Mapping[str, object]]:
        records, dropped = run.read("any")
        asking = run.asking(student)
        candidates, same = sampled(asking, records, run.out, samples=samples)
        if not candidates:
            return Made(entries=[], dropped=[*dropped, *same]), {}
        path = run.out / "candidates.json"
        with run.world.together():
            if run.world.is_main:
                entries = [entry for one in candidates for entry in one.entries()]
                write_whole(path, [json.dumps(entries).encode()])
        scores = run.scores(path, asked.images or str(Path(asked.data).parent))
        settings = {"samples": samples, "margin": margin, "judge": asked.model}
        origin = {
            **asking.provenance("feedback", "the records' own questions"),
            "judge_hash": model_fingerprint(model_directory(asked.model)),
            "feedback": settings,
        }
        made = paired(candidates, scores, margin=margin, origin=origin)
        return _with(made, [*dropped, *same]), origin

    return elicit(asked, work)


def _with(made: Made, dropped: list[Dropped]) -> Made:
    return Made(entries=made.entries, dropped=[*dropped, *made.dropped])


@dataclass(frozen=True, kw_only=True)
class Run:
    """One call on one rank."""

    asked: Answering
    world: World
    tables: Tables

    @property
    def out(self) -> Path:
        return Path(self.asked.out)

    @property
    def dtype(self) -> Dtype:
        return self.asked.dtype or ("float32" if self.world.device.type == "cpu" else "bfloat16")

    def read(self, which: Which) -> tuple[list[Asked], list[Dropped]]:
        return read_asked(
            self.asked.data,
            image_root=self.asked.images,
            follow_symlinks=self.asked.follow_symlinks,
            which=which,
        )

    def asking(self, model: str) -> Asking:
        ranks = Ranks(self.world.rank, self.world.size)
        device = str(self.world.device)
        return Asking(
            model=Model(model_directory(model), ranks=ranks, device=device, dtype=self.dtype),
            writing=self.asked.writing,
            batch_size=self.asked.batch_size,
            max_new_tokens=self.asked.max_new_tokens,
            progress=self.world.is_main,
        )

    def scores(self, path: Path, images: str | None) -> dict[str, float]:
        """Mean log p a token of each record's answers, by its id; none for a bad record."""
        data = DataConfig(
            path=str(path),
            images=images,
            follow_symlinks=self.asked.follow_symlinks,
            max_length=self.asked.max_length,
            num_workers=0,
            max_bad_rate=1.0,
        )
        place = Place(path=str(path), images=images, follow_symlinks=data.follow_symlinks)
        source = open_source(place, self.tables.sources)
        model = TeacherConfig(checkpoint=str(model_directory(self.asked.model)), dtype=self.dtype)
        scorer = Scorer.of("judge", model, data, source, self.tables.templates)
        with self.world.together():
            if self.world.is_main:
                claim(self.out / "scores", {**scorer.identity})
        found = scorer.score(
            self.world, self.out / "scores", data, rows=self.asked.batch_size, say=speaker(self.world)
        )
        return {one.id: -one.mean("tokens") for one in found.values()}


def elicit(
    asked: Answering, work: Callable[[Run], tuple[Made, Mapping[str, object]]], tables: Tables = OURS
) -> str:
    """Do the work on every rank and write what came out on the first; what to say of it."""
    out = Path(asked.out)
    with peers(), ExitStack() as held:
        world = join(asked.device, timeout_minutes=_TIMEOUT_MINUTES)
        with world.together():
            if world.is_main:
                held.enter_context(locked(out, "--out"))
        with world.together():
            made, origin = work(Run(asked=asked, world=world, tables=tables))
        with world.together():
            said = made.write(out, origin) if world.is_main else ""
        return said
