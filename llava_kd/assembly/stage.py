"""A stage from its loaded models to its trainer, in steps of which each takes what the one before gave."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from llava_kd.assembly.parts.adapters import adapt_student
from llava_kd.assembly.parts.cross.words import with_words
from llava_kd.assembly.parts.data import make_loader
from llava_kd.assembly.parts.engine import compiles_first, make_engine
from llava_kd.assembly.parts.held_out import evaluator
from llava_kd.assembly.parts.lending import tap_student
from llava_kd.assembly.parts.models import compute_dtype, placed_student
from llava_kd.assembly.parts.objective import objective, token_policy
from llava_kd.assembly.parts.on_policy.assembling import stand_in_for, with_own_answers
from llava_kd.assembly.parts.on_policy.stand_in import StandIn
from llava_kd.assembly.parts.several.teachers import Others
from llava_kd.assembly.parts.teacher import say_left_out, teaching_of
from llava_kd.assembly.parts.teaching.peer import peer_of
from llava_kd.assembly.parts.teaching.pictures import with_changed_pictures
from llava_kd.assembly.parts.tuning.centroids import with_centroids
from llava_kd.assembly.planning.operations import Count, operations, peak
from llava_kd.config import TrainConfig, dump
from llava_kd.data.batches.loader import Loader
from llava_kd.data.sources.conversation import Source
from llava_kd.distill.student import Student
from llava_kd.distill.teaching.door import Teaching
from llava_kd.distill.teaching.guarded import Guarded
from llava_kd.distill.teaching.on_policy.own_answers import OwnAnswers
from llava_kd.models.files.checkpoint import Parts
from llava_kd.models.foreign.loading import AnyParts, as_llava
from llava_kd.models.mllm import MLLM
from llava_kd.parallel.engine import Engine
from llava_kd.parallel.world import World
from llava_kd.training.checkpoint import Checkpoints
from llava_kd.training.measuring.operations import Counted
from llava_kd.training.measuring.profiling import Profiled
from llava_kd.training.metrics import Metrics
from llava_kd.training.progress import Progress
from llava_kd.training.schedule import Cadence, Schedule, cosine_with_warmup
from llava_kd.training.trackers import TensorBoardTracker, Tracker, WandbRun, WandbTracker
from llava_kd.training.trainer import Loader as TrainingLoader
from llava_kd.training.trainer import Output, Trainer

Say = Callable[[str], None]
ENOUGH_STEPS = 50


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """The student with its decoder in few bits and its adapters in, where they are asked for."""

    student: Parts


@dataclass(frozen=True, kw_only=True)
class Placed:
    """It on its device, in its types, what trains marked, each layer with its kernel of attention.

    `stand_in` writes its answers where it will be sharded.
    """

    adapted: Adapted
    mllm: MLLM
    kernel: str
    stand_in: StandIn | None


@dataclass(frozen=True, kw_only=True)
class Fed:
    """With the loader, which knows whether the teacher sees through the student's tower."""

    placed: Placed
    teacher: AnyParts | None
    loader: Loader
    shares_tower: bool


@dataclass(frozen=True, kw_only=True)
class Accompanied:
    """With whoever teaches: both models are watched and placed, and no engine has sharded anything."""

    fed: Fed
    teaching: Teaching | None


@dataclass(frozen=True, kw_only=True)
class Joined:
    """All that trains, as the one module that an engine wraps."""

    accompanied: Accompanied
    module: Student
    operations: Mapping[str, Count]


@dataclass(frozen=True, kw_only=True)
class Driven:
    """Under its engine."""

    joined: Joined
    engine: Engine


def assemble(
    config: TrainConfig,
    world: World,
    student: Parts,
    teacher: AnyParts | None,
    say: Say = print,
    *,
    identity: Mapping[str, str] | None = None,
    source: Source | None = None,
    others: Others | None = None,
) -> tuple[Trainer, Engine]:
    """Trainer and engine of a stage from its loaded models.

    `identity` is of what its checkpoints rely on (see `Checkpoints`), before the models are placed. `source`
    is the records, where they are read already. `others` are the teachers that `teacher.several` names. A
    peer comes in the teacher's place.
    """
    adapted = _adapt(config, student, say)
    placed = _place(config, world, adapted)
    fed = _feed(config, world, placed, teacher, source)
    accompanied = _accompany(config, world, fed, source, say, others)
    joined = _join(config, accompanied, source, say)
    driven = _drive(config, world, joined, say)
    return _trainer(config, driven, say, identity or {}), driven.engine


def _adapt(config: TrainConfig, student: Parts, say: Say) -> Adapted:
    adapt_student(student, config.student, compute_dtype=compute_dtype(config), seed=config.seed, say=say)
    return Adapted(student=student)


def _place(config: TrainConfig, world: World, adapted: Adapted) -> Placed:
    mllm, kernel = placed_student(config, world, adapted.student)
    tap_student(config, mllm)
    stand_in = stand_in_for(config, adapted.student)
    return Placed(adapted=adapted, mllm=mllm, kernel=kernel, stand_in=stand_in)


def _feed(
    config: TrainConfig, world: World, placed: Placed, teacher: AnyParts | None, source: Source | None
) -> Fed:
    loader, shares_tower = make_loader(config, world, placed.adapted.student, teacher, source)
    return Fed(placed=placed, teacher=teacher, loader=loader, shares_tower=shares_tower)


def _accompany(
    config: TrainConfig, world: World, fed: Fed, source: Source | None, say: Say, others: Others | None
) -> Accompanied:
    teaching = None
    student, mllm, shares = fed.placed.adapted.student, fed.placed.mllm, fed.shares_tower
    if fed.teacher is not None and config.peer is not None:
        its = as_llava(fed.teacher, "`peer`")
        teaching = peer_of(config, world, (student, mllm), its, say, shares_tower=shares)
    elif fed.teacher is not None:
        teaching = teaching_of(
            config, world, (student, mllm), fed.teacher, say, shares_tower=shares, others=others
        )
        if config.pictures is not None:
            models = (student, mllm), as_llava(fed.teacher, "`pictures`")
            teaching = with_changed_pictures(config, world, models, teaching, source, say)
        if config.on_policy is not None:
            teaching = OwnAnswers(teaching)
    policy = token_policy(config)
    if policy is None:
        return Accompanied(fed=fed, teaching=teaching)
    if policy.cross_entropy > 0:
        say(
            f"token_policy.cross_entropy is {policy.cross_entropy:g}: hard labels teach the private tokens "
            "themselves, so the teacher's soft targets no longer hide them"
        )
    return Accompanied(fed=fed, teaching=Guarded(teaching or Teaching(), policy))


def _join(config: TrainConfig, accompanied: Accompanied, source: Source | None, say: Say) -> Joined:
    fed = accompanied.fed
    student, teacher = fed.placed.adapted.student, fed.teacher
    terms = objective(config.objective, student, teacher, config.data.visual_alignment, seed=config.seed)
    terms = with_centroids(config, terms, student, source)
    terms = with_words(config, terms, student, teacher, say)
    if teacher is not None and (num_common := terms.common.num_common) is not None:
        say_left_out(config, student, teacher, num_common, say)
    module = Student(fed.placed.mllm, terms, accompanied.teaching).train()
    counted = operations(student, teacher, config.teacher, terms.terms, shares_tower=fed.shares_tower)
    return Joined(accompanied=accompanied, module=module, operations=counted)


def _drive(config: TrainConfig, world: World, joined: Joined, say: Say) -> Driven:
    num_steps(config, joined.accompanied.fed.loader.steps_per_epoch)  # a run without a step is refused before
    if (note := compiles_first(config)) is not None:
        say(note)
    engine = make_engine(config, world, joined.module)
    say(f"attention of the student: {joined.accompanied.fed.placed.kernel}")
    return Driven(joined=joined, engine=engine)


def _trainer(config: TrainConfig, driven: Driven, say: Say, identity: Mapping[str, str]) -> Trainer:
    module, engine, fed = driven.joined.module, driven.engine, driven.joined.accompanied.fed
    student = fed.placed.adapted.student
    total = num_steps(config, fed.loader.steps_per_epoch)
    if (warning := few_steps(total)) is not None:
        say(warning)
    evaluate = None
    if config.evaluate is not None:
        evaluate = evaluator(config, config.evaluate, student, module, engine)
    return Trainer(
        engine=engine,
        student=module,
        loader=_measured(config, driven, say),
        schedule=_schedule(config, total),
        cadence=Cadence(
            save_every=config.checkpoint.every,
            log_every=config.log.every,
            evaluate_every=0 if config.evaluate is None else config.evaluate.every,
            diagnose_every=config.log.diagnostics_every,
        ),
        output=Output(
            checkpoints=_checkpoints(config, {**identity, "data or tokenizer": fed.loader.fingerprint}),
            metrics=_metrics(config, engine.world, total, fed.loader.steps_per_epoch),
            say=say,
        ),
        evaluate=evaluate,
        seed=config.seed,
    )


def _measured(config: TrainConfig, driven: Driven, say: Say) -> TrainingLoader:
    """The loader, which counts operations, and traces the steps that are asked for.

    Where the student answers for itself, its answers are in what is counted, and writing them is not.
    """
    fed, world = driven.joined.accompanied.fed, driven.engine.world
    placed = fed.placed
    student = placed.adapted.student
    own = student, placed.mllm, placed.stand_in
    loader = with_own_answers(config, fed.loader, own, fed.teacher, driven.engine, say)
    counted = Counted(loader, driven.joined.operations, peak=peak(world.device))
    if config.profile is None:
        return counted
    directory = Path(config.output_dir) / "profile"
    steps = config.profile.steps
    return Profiled(counted, directory, steps=steps, device=world.device, rank=world.rank, say=say)


def _schedule(config: TrainConfig, total: int) -> Schedule:
    optim = config.optim
    rates = {part: optim.lr_by_part.get(part, optim.lr) for part in config.trainable}
    return Schedule(
        num_steps=total,
        base_lr=optim.lr,
        lr_multiplier=lambda step: cosine_with_warmup(step, num_steps=total, warmup_ratio=optim.warmup_ratio),
        max_grad_norm=optim.max_grad_norm,
        lr_of_part=rates if optim.lr_by_part else {},
    )


def _checkpoints(config: TrainConfig, identity: Mapping[str, str]) -> Checkpoints:
    return Checkpoints(
        Path(config.output_dir) / "checkpoints",
        keep=config.checkpoint.keep,
        best=config.checkpoint.best,
        extra_files={"config.yaml": dump(config)},
        identity=identity,
    )


def num_steps(config: TrainConfig, steps_per_epoch: int) -> int:
    """Optimiser steps of the whole stage. Raises ValueError if there is none."""
    steps = math.ceil(steps_per_epoch * config.epochs) if config.max_steps is None else config.max_steps
    if steps < 1:
        raise ValueError(
            f"a run needs at least one step; this one has {steps_per_epoch} steps per epoch, "
            f"epochs={config.epochs}, max_steps={config.max_steps}; lower global_batch_size or give more "
            "records"
        )
    return steps


def few_steps(total: int) -> str | None:
    """A warning for a run that is over before its rates have risen and fallen."""
    if total >= ENOUGH_STEPS:
        return None
    return (
        f"{total} optimiser steps are too few to learn much (use at least about {ENOUGH_STEPS}): lower "
        "global_batch_size, raise epochs, or give more records"
    )


def _metrics(config: TrainConfig, world: World, num_steps: int, steps_per_epoch: int) -> Metrics | None:
    if not world.is_main:
        return None
    output, log = Path(config.output_dir), config.log
    trackers: list[Tracker] = []
    if log.wandb_project is not None:
        run = WandbRun(
            project=log.wandb_project,
            name=log.wandb_name or output.name,
            entity=log.wandb_entity,
            group=log.wandb_group,
            tags=log.wandb_tags,
            id=log.wandb_id,
        )
        trackers.append(WandbTracker(output, run, config={"config": dump(config)}))
    if log.tensorboard:
        trackers.append(TensorBoardTracker(output / "tensorboard"))
    title = f"{output.parent.name}/{output.name}"
    return Metrics(
        output,
        num_steps=num_steps,
        every=log.every,
        trackers=trackers,
        progress=Progress(num_steps, title, line=log.progress_line, is_shown=log.progress),
        terms=list(config.objective.terms),
        steps_per_epoch=steps_per_epoch,
    )
