"""A stage from its settings to its end: the composition root."""

from __future__ import annotations

import importlib.metadata
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import transformers

from llava_kd import __version__
from llava_kd.build.data import make_loader
from llava_kd.build.engine import make_engine
from llava_kd.build.models import DTYPES, place, student_dtypes, student_parts
from llava_kd.build.objective import objective, wants_head_gram
from llava_kd.config import TrainConfig, dump, load
from llava_kd.distill.student import Student
from llava_kd.distill.teacher import Teacher
from llava_kd.models.checkpoint import Parts, load_stock, save_stock
from llava_kd.models.mllm import MLLM, PARTS
from llava_kd.parallel.engine import Engine
from llava_kd.parallel.world import World, join, leave
from llava_kd.training.checkpoint import Checkpoints, write_text
from llava_kd.training.metrics import Metrics, TensorBoardTracker, Tracker, WandbTracker
from llava_kd.training.schedule import cosine_with_warmup
from llava_kd.training.trainer import Trainer

VERSIONED = ("torch", "transformers", "numpy", "pillow")


def train(config: TrainConfig) -> str | None:
    """Run one stage to its end, or go on with it. The name of the signal, if one stopped it.

    Writes `metrics.jsonl`, `checkpoints/` and, at the end, the student as a stock LLaVA directory `model/`
    into `config.output_dir`. Raises ValueError for settings that do not fit the models, data or machine.
    """
    world = join(config.engine.device)
    try:
        return _train(config, world)
    finally:
        leave()


def _train(config: TrainConfig, world: World) -> str | None:
    output = Path(config.output_dir)
    say = _speaker(world)
    if claim(config, world):
        say(f"{output} is complete: nothing to do; its student is {output / 'model'}")
        return None
    torch.manual_seed(config.seed)
    transformers.logging.disable_progress_bar()
    student = student_parts(config.student, template=config.data.template, seed=config.seed)
    teacher = None
    if config.teacher is not None:
        teacher = load_stock(config.teacher.checkpoint, dtype=DTYPES[config.teacher.dtype])
    trainer, engine = assemble(config, world, student, teacher, say)
    if (stopped := trainer.fit()) is not None:
        return stopped
    trained = {name.removeprefix("mllm."): tensor for name, tensor in engine.parameters().items()}
    if world.is_main:
        dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
        save_stock(student, output / "model", trained=trained, dtype=dtype)
        write_text(output / "run.json", json.dumps({"completed": True, "versions": versions()}, indent=2))
    world.barrier()
    say(f"done: the student is {output / 'model'}")
    return None


def assemble(
    config: TrainConfig,
    world: World,
    student: Parts,
    teacher: Parts | None,
    say: Callable[[str], None] = print,
) -> tuple[Trainer, Engine]:
    """Trainer and engine of a stage from its loaded models."""
    mllm = MLLM(student.stock, trainable=config.trainable)
    place(mllm, world.device, student_dtypes(config))
    if config.engine.activation_checkpointing:
        student.stock.gradient_checkpointing_enable({"use_reentrant": False})
    loader, shares_tower = make_loader(config, world, student, teacher)
    module = Student(
        mllm, objective(config.objective, student, teacher, config.data.visual_alignment)
    ).train()
    num_steps = _num_steps(config, loader.steps_per_epoch)
    engine = make_engine(config, world, module)
    frozen_teacher = None
    if teacher is not None:
        teacher_mllm = MLLM(teacher.stock)
        assert config.teacher is not None
        place(teacher_mllm, world.device, dict.fromkeys(PARTS, DTYPES[config.teacher.dtype]))
        frozen_teacher = Teacher(
            teacher_mllm, shares_tower=shares_tower, keeps_head_gram=wants_head_gram(config.objective)
        )
        say("the tower runs once for both models" if shares_tower else "each model runs its own tower")
    trainer = Trainer(
        engine=engine,
        student=module,
        teacher=frozen_teacher,
        loader=loader,
        checkpoints=Checkpoints(
            Path(config.output_dir) / "checkpoints",
            keep=config.checkpoint.keep,
            extra_files={"config.yaml": dump(config)},
        ),
        metrics=_metrics(config, world, num_steps),
        lr_multiplier=lambda step: cosine_with_warmup(
            step, num_steps=num_steps, warmup_ratio=config.optim.warmup_ratio
        ),
        base_lr=config.optim.lr,
        num_steps=num_steps,
        max_grad_norm=config.optim.max_grad_norm,
        save_every=config.checkpoint.every,
        say=say,
    )
    return trainer, engine


def claim(config: TrainConfig, world: World) -> bool:
    """Make or re-enter the output directory; True if its run is complete.

    Raises ValueError if it holds another run: logging and checkpoint intervals may change, nothing else.
    A run that stopped before its first step, over a mistake in its settings or data, does not count.
    """
    output = Path(config.output_dir)
    written = output / "config.yaml"
    has_begun = any((output / name).exists() for name in ("metrics.jsonl", "checkpoints", "run.json"))
    if written.is_file():
        before = load(written) if has_begun else config
        if replace(before, log=config.log, checkpoint=config.checkpoint) != config:
            raise ValueError(
                f"{output} already holds another run (see {written}); choose a new output_dir or remove it"
            )
    elif output.is_dir() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty and holds no run; choose a new output_dir")
    world.barrier()
    if world.is_main:
        output.mkdir(parents=True, exist_ok=True)
        write_text(written, dump(config))
    world.barrier()
    return (output / "run.json").is_file()


def _num_steps(config: TrainConfig, steps_per_epoch: int) -> int:
    num_steps = math.ceil(steps_per_epoch * config.epochs)
    if config.max_steps is not None:
        num_steps = config.max_steps
    if num_steps < 1:
        raise ValueError(
            f"the run has no step: {steps_per_epoch} steps an epoch, epochs={config.epochs}, "
            f"max_steps={config.max_steps}; lower global_batch_size or give more records"
        )
    return num_steps


def _metrics(config: TrainConfig, world: World, num_steps: int) -> Metrics | None:
    if not world.is_main:
        return None
    output = Path(config.output_dir)
    trackers: list[Tracker] = []
    if config.log.wandb_project is not None:
        settings = {"config": dump(config)}
        trackers.append(WandbTracker(project=config.log.wandb_project, name=output.name, config=settings))
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


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    return {"llava_kd": __version__, **{name: importlib.metadata.version(name) for name in VERSIONED}}


def _speaker(world: World) -> Callable[[str], None]:
    def say(message: str) -> None:
        if world.is_main:
            print(message, file=sys.stderr, flush=True)

    return say
