"""A stage from its settings to its end: the composition root."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from llava_kd.assembly.estimate import Sizes, memory, refuse_too_large
from llava_kd.assembly.parts.adapters import adapt_student, check_bits, quantize_teacher
from llava_kd.assembly.parts.data import BAD_RECORDS, bad_records, make_loader, make_source, served
from llava_kd.assembly.parts.engine import make_engine
from llava_kd.assembly.parts.held_out import evaluator, read_held_out
from llava_kd.assembly.parts.lending import lend, with_projector
from llava_kd.assembly.parts.models import (
    DTYPES,
    choose_attention,
    compute_dtype,
    place,
    student_dtypes,
    student_parts,
    wholly_trained,
)
from llava_kd.assembly.parts.objective import objective, wants_head_gram
from llava_kd.assembly.parts.slices import read_slices
from llava_kd.assembly.parts.teacher import (
    cached_teacher,
    is_cached,
    say_left_out,
    teacher_fingerprints,
    teacher_parts,
    teacher_template,
)
from llava_kd.assembly.runs.provenance import checked_parent, finish
from llava_kd.assembly.runs.run_dir import check_world, claim
from llava_kd.config import TrainConfig, dump
from llava_kd.data.sources.conversation import Source
from llava_kd.distill.options import Switch
from llava_kd.distill.student import Student
from llava_kd.distill.teaching.cached import CachedTeacher
from llava_kd.distill.teaching.live import Teacher
from llava_kd.models.files.card import reading_notes
from llava_kd.models.files.checkpoint import Parts, save_stock
from llava_kd.models.fingerprint import weights_fingerprint
from llava_kd.models.language_model import checkpoint_activations
from llava_kd.models.lora import merge_adapters
from llava_kd.models.mllm import MLLM, PARTS
from llava_kd.models.reading import existing
from llava_kd.parallel.engine import Engine
from llava_kd.parallel.teacher_placement import offload_layers, shard_layers
from llava_kd.parallel.world import World, join, peers
from llava_kd.training.checkpoint import Checkpoints
from llava_kd.training.metrics import Metrics, TensorBoardTracker, Tracker, WandbTracker
from llava_kd.training.schedule import cosine_with_warmup
from llava_kd.training.trainer import Trainer


def train(config: TrainConfig) -> str | None:
    """Run one stage to its end, or go on with it. The name of the signal, if one stopped it.

    Writes `metrics.jsonl`, `checkpoints/` and, at the end, the student as a stock LLaVA directory `model/`
    into `config.output_dir`. Raises ValueError for settings that do not fit the models, data or machine.
    """
    with peers():
        world = join(config.engine.device, timeout_minutes=config.engine.timeout_minutes)
        check_world(config, world)
        with claim(config, world) as is_complete:
            if not is_complete:
                return _train(config, world)
            output = Path(config.output_dir)
            speaker(world)(f"{output} is complete: nothing to do; its student is {output / 'model'}")
            return None


def _train(config: TrainConfig, world: World) -> str | None:
    output = Path(config.output_dir)
    say = speaker(world)
    with world.together():
        parent = checked_parent(config.student.checkpoint) if world.is_main else None
        check_bits(config, world.device)
        # What is wrong with these is said before a model is read.
        read_slices(config)
        read_held_out(config)
        source = make_source(config.data, seed=config.seed)
        if config.teacher is not None and config.teacher.checkpoint is not None:
            existing(config.teacher.checkpoint, "the LLaVA checkpoint")
    torch.manual_seed(config.seed)
    transformers.logging.disable_progress_bar()
    student = student_parts(
        config.student,
        template=config.data.template,
        seed=config.seed,
        say=lambda line: say(f"template of the student: {line}"),
    )
    teacher = teacher_parts(config)
    if teacher is not None:
        say(f"template of the teacher: {teacher_template(config, teacher)}")
    student = with_projector(config, student, teacher)
    identity = frozen_fingerprints(config, student, teacher)
    if world.device.type == "cuda":
        sizes = Sizes.of(student.stock, config)
        needs = memory(config, world.size, sizes, teacher and Sizes.of(teacher.stock))
        refuse_too_large(needs, torch.cuda.get_device_properties(world.device).total_memory)
    trainer, engine = assemble(config, world, student, teacher, say, identity=identity, source=source)
    if (stopped := trainer.fit()) is not None:
        return stopped
    weights = engine.parameters()
    with world.together():
        if world.is_main:
            best = None
            if config.checkpoint.export == "best":
                best, moved = trainer.best_weights()
                weights |= moved
            trained = {  # what terms bring stays behind
                name.removeprefix("mllm."): tensor
                for name, tensor in weights.items()
                if name.startswith("mllm.")
            }
            if config.student.lora is not None:
                trained = merge_adapters(student.stock, trained)
            finished = served(student, config.data)
            save_stock(finished, output / "model", trained=trained, dtype=compute_dtype(config))
            finish(
                config,
                num_steps=trainer.num_steps,
                identity=trainer.identity,
                parent=parent,
                exported=best,
                reading=reading_notes(student.processor),
            )
    if world.is_main and (bad := bad_records(output)):
        say(f"{bad} records were bad and are not trained on: {output / BAD_RECORDS} names them")
    say(f"done: the student is {output / 'model'}")
    return None


def assemble(
    config: TrainConfig,
    world: World,
    student: Parts,
    teacher: Parts | None,
    say: Callable[[str], None] = print,
    *,
    identity: Mapping[str, str] | None = None,
    source: Source | None = None,
) -> tuple[Trainer, Engine]:
    """Trainer and engine of a stage from its loaded models.

    `identity` is of what its checkpoints rely on (see `Checkpoints`), before the models are placed. `source`
    is the records, where they are read already.
    """
    adapt_student(student, config.student, compute_dtype=compute_dtype(config), seed=config.seed, say=say)
    mllm = MLLM(student.stock, trainable=config.trainable, tower_last_layers=config.vision_tower_last_layers)
    place(mllm, world.device, student_dtypes(config))
    is_packed = config.data.packing is not None
    kernel = choose_attention(mllm, world.device, compute_dtype(config), whose="student", is_packed=is_packed)
    if config.engine.activation_checkpointing:
        checkpoint_activations(student.stock)
    loader, shares_tower = make_loader(config, world, student, teacher, source)
    frozen_teacher, switched = _teaching(config, world, student, teacher, mllm, say, shares_tower)
    terms = objective(config.objective, student, teacher, config.data.visual_alignment, seed=config.seed)
    if teacher is not None and (num_common := terms.common.num_common) is not None:
        say_left_out(config, student, teacher, num_common, say)
    module = Student(mllm, terms, switched).train()
    total = num_steps(config, loader.steps_per_epoch)
    engine = make_engine(config, world, module)
    say(f"attention of the student: {kernel}")
    evaluate = None
    if config.evaluate is not None:
        evaluate = evaluator(config, config.evaluate, student, module, engine)
    trainer = Trainer(
        engine=engine,
        student=module,
        teacher=frozen_teacher,
        loader=loader,
        checkpoints=_checkpoints(config, {**(identity or {}), "data or tokenizer": loader.fingerprint}),
        metrics=_metrics(config, world, total),
        lr_multiplier=lambda step: cosine_with_warmup(
            step, num_steps=total, warmup_ratio=config.optim.warmup_ratio
        ),
        base_lr=config.optim.lr,
        num_steps=total,
        max_grad_norm=config.optim.max_grad_norm,
        save_every=config.checkpoint.every,
        log_every=config.log.every,
        seed=config.seed,
        evaluate=evaluate,
        evaluate_every=0 if config.evaluate is None else config.evaluate.every,
        say=say,
    )
    return trainer, engine


def _checkpoints(config: TrainConfig, identity: Mapping[str, str]) -> Checkpoints:
    return Checkpoints(
        Path(config.output_dir) / "checkpoints",
        keep=config.checkpoint.keep,
        best=config.checkpoint.best,
        extra_files={"config.yaml": dump(config)},
        identity=identity,
    )


def _teaching(
    config: TrainConfig,
    world: World,
    student: Parts,
    teacher: Parts | None,
    mllm: MLLM,
    say: Callable[[str], None],
    shares_tower: bool,
) -> tuple[Teacher | CachedTeacher | None, Switch | None]:
    """What predicts as the teacher, and its path for the student's visual output."""
    if teacher is None:
        return None, None
    if is_cached(config):
        return cached_teacher(config, teacher, world.device, say), None
    is_packed = config.data.packing is not None
    frozen = placed_teacher(config, world, teacher, shares_tower=shares_tower, is_packed=is_packed)
    say("the tower runs once for both models" if shares_tower else "each model runs its own tower")
    return frozen, lend(config, student, teacher, mllm, frozen.mllm)


def placed_teacher(
    config: TrainConfig, world: World, teacher: Parts, *, shares_tower: bool, is_packed: bool = False
) -> Teacher:
    """The teacher where the settings want it, frozen; `is_packed`: it reads rows of several records."""
    assert config.teacher is not None
    dtype = DTYPES[config.teacher.dtype]
    quantize_teacher(teacher, config.teacher, compute_dtype=dtype)
    mllm = MLLM(teacher.stock)
    decoder, layers = mllm.language_model, mllm.language_model.layers
    if config.teacher.placement == "fsdp":
        shard_layers(decoder, layers, world, dtype)
    if config.teacher.placement == "cpu_offload":
        decoder.layers = torch.nn.ModuleList()  # they stay behind while the others move
    place(mllm, world.device, dict.fromkeys(PARTS, dtype))
    if config.teacher.placement == "cpu_offload":
        decoder.layers = layers
        offload_layers(layers, world.device, dtype)
    choose_attention(mllm, world.device, dtype, whose="teacher", is_packed=is_packed)
    return Teacher(mllm, shares_tower=shares_tower, keeps_head_gram=wants_head_gram(config.objective))


def frozen_fingerprints(config: TrainConfig, student: Parts, teacher: Parts | None) -> dict[str, str]:
    """Hashes of the weights that a run relies on and does not save, as they are on disk."""
    mllm = MLLM(
        student.stock, trainable=wholly_trained(config), tower_last_layers=config.vision_tower_last_layers
    )
    weights = {
        f"{part}.{index}.{name}": tensor
        for part, modules in mllm.parts().items()
        for index, module in enumerate(modules)
        for name, tensor in module.state_dict(keep_vars=True).items()
        if not tensor.requires_grad
    }
    prints = {"frozen part of the student": weights_fingerprint(weights)}
    return prints | teacher_fingerprints(config, teacher)


def num_steps(config: TrainConfig, steps_per_epoch: int) -> int:
    """Optimiser steps of the whole stage. Raises ValueError if there is none."""
    steps = math.ceil(steps_per_epoch * config.epochs) if config.max_steps is None else config.max_steps
    if steps < 1:
        raise ValueError(
            f"the run has no step: {steps_per_epoch} steps an epoch, epochs={config.epochs}, "
            f"max_steps={config.max_steps}; lower global_batch_size or give more records"
        )
    return steps


def _metrics(config: TrainConfig, world: World, num_steps: int) -> Metrics | None:
    if not world.is_main:
        return None
    output = Path(config.output_dir)
    trackers: list[Tracker] = []
    if config.log.wandb_project is not None:
        settings = {"config": dump(config)}
        trackers.append(
            WandbTracker(output, project=config.log.wandb_project, name=output.name, config=settings)
        )
    if config.log.tensorboard:
        trackers.append(TensorBoardTracker(output / "tensorboard"))
    return Metrics(
        output,
        num_steps=num_steps,
        every=config.log.every,
        trackers=trackers,
        progress=config.log.progress,
        title=f"{output.parent.name}/{output.name}",
        line=config.log.progress_line,
    )


def speaker(world: World) -> Callable[[str], None]:
    def say(message: str) -> None:
        if world.is_main:
            tqdm.write(message, file=sys.stderr)  # above a progress bar, not into it
            sys.stderr.flush()

    return say
