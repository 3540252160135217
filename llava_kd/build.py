"""The composition root: a `TrainConfig` becomes objects. The only reader of the tree."""

from __future__ import annotations

import importlib.metadata
import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
import transformers

from llava_kd import __version__
from llava_kd.config import DataConfig, KLConfig, ObjectiveConfig, StudentConfig, TrainConfig, dump, load
from llava_kd.data.images import ImageTransform
from llava_kd.data.loader import Loader, Side
from llava_kd.data.records import LlavaJson
from llava_kd.data.template import TEMPLATES
from llava_kd.distill.objective import KL, CrossEntropy, Objective, Relation
from llava_kd.distill.student import Student
from llava_kd.distill.teacher import Teacher
from llava_kd.losses import head_loss, reference, relation
from llava_kd.models.checkpoint import Parts, compose, load_stock, save_stock
from llava_kd.models.mllm import MLLM, PARTS
from llava_kd.models.vision_tower import tower_fingerprint
from llava_kd.models.vocabulary import num_common_columns
from llava_kd.parallel.engine import AdamWSettings, Engine, ParameterGroup
from llava_kd.parallel.torch_engine import TorchEngine
from llava_kd.parallel.world import World, join, leave
from llava_kd.training.checkpoint import Checkpoints, write_text
from llava_kd.training.metrics import Metrics, TensorBoardTracker, Tracker, WandbTracker
from llava_kd.training.schedule import cosine_with_warmup
from llava_kd.training.trainer import Trainer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HEAD_LOSSES = {"fast": head_loss.head_loss, "reference": reference.head_loss}
RELATIONS = {"fast": relation.relation_rows, "reference": reference.relation_rows}
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
    _place(mllm, world.device, _student_dtypes(config))
    if config.engine.activation_checkpointing:
        student.stock.gradient_checkpointing_enable({"use_reentrant": False})
    loader, shares_tower = _loader(config, world, student, teacher)
    module = Student(mllm, objective(config.objective, student, teacher)).train()
    num_steps = _num_steps(config, loader.steps_per_epoch)
    engine = _engine(config, world, module)
    frozen_teacher = None
    if teacher is not None:
        teacher_mllm = MLLM(teacher.stock)
        assert config.teacher is not None
        _place(teacher_mllm, world.device, dict.fromkeys(PARTS, DTYPES[config.teacher.dtype]))
        frozen_teacher = Teacher(
            teacher_mllm, shares_tower=shares_tower, keeps_head_gram=_wants_head_gram(config.objective)
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
    """
    output = Path(config.output_dir)
    written = output / "config.yaml"
    if written.is_file():
        before = load(written)
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


def student_parts(config: StudentConfig, *, template: str, seed: int) -> Parts:
    """The student to train, in fp32, with the chat template that its data use."""
    if config.checkpoint is not None:
        parts = load_stock(config.checkpoint)
    else:
        assert config.vision_tower is not None
        assert config.language_model is not None
        parts = compose(
            vision_tower=config.vision_tower,
            language_model=config.language_model,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            seed=seed,
        )
    if template not in TEMPLATES:
        raise ValueError(f"`data.template` must be one of {', '.join(TEMPLATES)}; got {template!r}")
    parts.processor.chat_template = TEMPLATES[template].chat_template
    parts.processor.tokenizer.chat_template = TEMPLATES[template].chat_template
    return parts


def objective(config: ObjectiveConfig, student: Parts, teacher: Parts | None) -> Objective:
    """The weighted terms, with the vocabulary that both heads share."""
    needs_vocabulary = config.response_kl is not None or config.visual_kl is not None
    num_common = None
    if needs_vocabulary and teacher is not None:
        num_common = num_common_columns(
            student.processor.tokenizer,
            teacher.processor.tokenizer,
            student_rows=student.stock.lm_head.weight.shape[0],
            teacher_rows=teacher.stock.lm_head.weight.shape[0],
        )
    ce, rel = config.cross_entropy, config.relation
    return Objective(
        cross_entropy=None if ce is None else CrossEntropy(weight=ce.weight),
        response_kl=_kl(config.response_kl),
        visual_kl=_kl(config.visual_kl),
        relation=None
        if rel is None
        else Relation(weight=rel.weight, tap=rel.tap, centre=rel.centre, normalise=rel.normalise),
        num_common=num_common,
        head_loss=HEAD_LOSSES[config.losses],
        relation_rows=RELATIONS[config.losses],
    )


def _wants_head_gram(config: ObjectiveConfig) -> bool:
    return config.losses == "fast" and config.relation is not None and config.relation.tap == "logits"


def _kl(config: KLConfig | None) -> KL | None:
    if config is None:
        return None
    return KL(
        weight=config.weight,
        temperature=config.temperature,
        divergence=reference.Divergence(config.divergence, config.mix),
    )


def side(parts: Parts, config: DataConfig) -> Side:
    """How one model reads records."""
    return Side(
        tokenizer=parts.processor.tokenizer,
        template=TEMPLATES[config.template],
        image_token_id=parts.stock.config.image_token_id,
        tokens_per_image=parts.tokens_per_image,
        transform=ImageTransform.from_processor(parts.processor.image_processor, config.image_aspect),
        max_length=config.max_length,
    )


def _loader(config: TrainConfig, world: World, student: Parts, teacher: Parts | None) -> tuple[Loader, bool]:
    """The loader, and whether both models have the same tower, so that it runs once."""
    data = config.data
    teacher_side, shares_tower = None, False
    if teacher is not None:
        shares_tower = _same_tower(config, student, teacher)
        if not shares_tower:
            teacher_side = side(teacher, data)
        visual = config.objective.visual_kl is not None or config.objective.relation is not None
        if visual and student.tokens_per_image != teacher.tokens_per_image:
            raise ValueError(
                f"visual_kl and relation need equal grids: the student has {student.tokens_per_image} visual "
                f"tokens an image, the teacher {teacher.tokens_per_image}; use the teacher's tower, layer "
                "and vision_feature_select_strategy, or drop both terms"
            )
    loader = Loader(
        source=LlavaJson(data.path, data.images),
        student=side(student, data),
        teacher=teacher_side,
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        micro_batch_size=config.micro_batch_size,
        rank=world.rank,
        world_size=world.size,
        device=world.device,
        num_workers=data.num_workers,
        max_bad_rate=data.max_bad_rate,
        bad_records_path=Path(config.output_dir) / "bad_records.jsonl",
    )
    return loader, shares_tower


def _same_tower(config: TrainConfig, student: Parts, teacher: Parts) -> bool:
    """By hash, never by name: weights in the computing type, preprocessing, layer and strategy."""
    if "vision_tower" in config.trainable:
        return False
    dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
    prints = [
        tower_fingerprint(
            parts.stock.model.vision_tower,
            parts.stock.config,
            parts.processor.image_processor.to_dict(),
            dtype=dtype,
        )
        for parts in (student, teacher)
    ]
    return prints[0] == prints[1]


def _place(mllm: MLLM, device: torch.device, dtypes: Mapping[str, torch.dtype]) -> None:
    """Each part onto the device, in its type."""
    for name, modules in mllm.parts().items():
        for module in modules:
            module.to(device, dtypes[name])


def _student_dtypes(config: TrainConfig) -> dict[str, torch.dtype]:
    """Trained parts in fp32, the masters of the optimiser; frozen ones in the computing type."""
    frozen = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
    return {name: torch.float32 if name in config.trainable else frozen for name in PARTS}


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


def _engine(config: TrainConfig, world: World, module: Student) -> Engine:
    kind = config.engine.kind
    if kind == "auto":
        kind = "single" if world.size == 1 else "ddp"
    groups = parameter_groups(config, module)
    adamw = AdamWSettings(
        betas=config.optim.betas, eps=config.optim.eps, weight_decay=config.optim.weight_decay
    )
    bf16 = config.engine.precision == "bf16"
    if kind == "deepspeed":
        from llava_kd.parallel.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(
            module,
            groups,
            world=world,
            zero_stage=config.engine.zero_stage,
            adamw=adamw,
            bf16=bf16,
            max_grad_norm=config.optim.max_grad_norm,
            micro_batch_size=config.micro_batch_size,
            accumulation=config.global_batch_size // (config.micro_batch_size * world.size),
        )
    mllm = module.mllm
    units = [*mllm.language_model.layers, mllm.multi_modal_projector]
    return TorchEngine(module, groups, world=world, kind=kind, adamw=adamw, bf16=bf16, shard_units=units)


def parameter_groups(config: TrainConfig, module: Student) -> list[ParameterGroup]:
    """One group a trained part, each with its own learning rate."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = []
    for part, modules in module.mllm.parts(config.trainable).items():
        owned = dict.fromkeys(names[id(p)] for child in modules for p in child.parameters())
        lr = config.optim.lr_by_part.get(part, config.optim.lr)
        groups.append(ParameterGroup(names=tuple(owned), lr=lr))
    return groups


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
