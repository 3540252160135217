"""The teacher of a stage: as it is loaded, whole or, beside a cache, its head alone, and as it teaches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from llava_kd.assembly.parts.adapters import quantize_teacher
from llava_kd.assembly.parts.foreign.settings import refuse_settings
from llava_kd.assembly.parts.foreign.teachers import describe, foreign_side, placed_foreign
from llava_kd.assembly.parts.lending import lend
from llava_kd.assembly.parts.models import DTYPES, choose_attention, place
from llava_kd.assembly.parts.objective import wants_head_gram
from llava_kd.assembly.parts.several.teachers import Others
from llava_kd.assembly.parts.stored_teacher import HEAD, served_as
from llava_kd.assembly.parts.teaching.visual_dependency import visually_weighed, weighing_of
from llava_kd.assembly.settings import tables_of
from llava_kd.config import TeacherConfig, TrainConfig
from llava_kd.data.foreign.talks import Talks
from llava_kd.data.teacher_store.store import Manifest
from llava_kd.data.text.template_choice import Choice, choose
from llava_kd.distill.formulas import FORMULAS
from llava_kd.distill.teaching.cached import CachedTeacher
from llava_kd.distill.teaching.door import Teaching
from llava_kd.distill.teaching.from_teacher import FromTeacher
from llava_kd.distill.teaching.live import Teacher
from llava_kd.distill.teaching.visual_dependency import StoredWeighing
from llava_kd.models.files.checkpoint import Parts, load_stock
from llava_kd.models.files.teacher_head import load_head_only, load_shapes
from llava_kd.models.foreign.grids import foreign_grid
from llava_kd.models.foreign.loading import (
    AnyParts,
    ForeignParts,
    foreign_without_weights,
    is_foreign,
    load_foreign,
    load_foreign_head,
    load_foreign_processor,
)
from llava_kd.models.heads.scaling import Scaling, scaling_of
from llava_kd.models.mllm import MLLM, PARTS
from llava_kd.models.towers.vision_tower import text_config
from llava_kd.models.vocabulary import left_out
from llava_kd.parallel.teacher_placement import offload_layers, shard_layers
from llava_kd.parallel.world import World


def load_teacher(config: TrainConfig) -> AnyParts:
    """Whole: a stock LLaVA, or another model of transformers that the settings can be served by."""
    assert config.teacher is not None
    name, dtype = config.teacher.checkpoint, DTYPES[config.teacher.dtype]
    if not is_foreign(name):
        return load_stock(name, dtype=dtype)
    check_foreign(config)
    return load_foreign(name, dtype=dtype)


def check_foreign(config: TrainConfig) -> None:
    """ValueError for settings that a teacher which is no LLaVA cannot serve, before its weights are read."""
    if config.teacher is not None and is_foreign(config.teacher.checkpoint):
        name = config.teacher.checkpoint
        stock, processor = foreign_without_weights(name), load_foreign_processor(name)
        Talks(processor)
        refuse_settings(config, type(stock).__name__, foreign_grid(stock.config, processor))


def teacher_parts(config: TrainConfig) -> AnyParts | None:
    """The teacher that the settings name; where a cache stands in, its head, tokenizer and shapes alone."""
    if config.teacher is None:
        return None
    if config.teacher.cache is None:
        return load_teacher(config)
    check_foreign(config)
    directory = Path(config.teacher.cache)
    manifest = Manifest.read(directory)
    if served_as(manifest.identity) is not None:
        return load_shapes(config.teacher.checkpoint)
    manifest.check(directory, HEAD)
    try:
        head = load_file(directory / HEAD)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{directory / HEAD} cannot be read ({error}); run the same `llava-kd cache-teacher` command "
            "again to rewrite it"
        ) from error
    load = load_foreign_head if is_foreign(config.teacher.checkpoint) else load_head_only
    return load(config.teacher.checkpoint, head["weight"], head.get("bias"))


def teacher_template(config: TrainConfig, teacher: AnyParts) -> Choice | str:
    """The template that the teacher is asked by, and why. ValueError where none can be guessed."""
    assert config.teacher is not None
    if isinstance(teacher, ForeignParts):
        return describe(teacher, foreign_side(teacher, config.data))[0]
    return choose(
        config.teacher.template or config.data.template,
        tokenizer=teacher.processor.tokenizer,
        model_type=text_config(teacher.stock.config).model_type,
        chat_template=teacher.processor.chat_template,
        where="data.template" if config.teacher.template is None else "teacher.template",
        templates=tables_of(config).templates,
    )


def is_cached(config: TrainConfig) -> bool:
    """Whether stored predictions stand in for the teacher."""
    return config.teacher is not None and config.teacher.cache is not None


def teaching_of(
    config: TrainConfig,
    world: World,
    student: tuple[Parts, MLLM],
    teacher: AnyParts,
    say: Callable[[str], None],
    *,
    shares_tower: bool,
    others: Others | None = None,
) -> Teaching:
    """Whoever teaches, behind its door. `student`: as it was loaded, and as it is placed.

    `others` are the teachers that `teacher.several` names.

    To be called before an engine shards the student, and after its kernel of attention is chosen.
    """
    formula = FORMULAS[config.objective.losses].head_loss
    assert config.teacher is not None
    weighing = weighing_of(config.teacher)
    if is_cached(config):
        stored = cached_teacher(config, teacher, world.device, say)
        if weighing is None:
            return FromTeacher(stored, head_loss=formula)
        say("the visual dependency of each token is also read from there")
        return StoredWeighing(weighing, stored, head_loss=formula)
    if isinstance(teacher, ForeignParts):
        say(f"the teacher is a {type(teacher.stock).__name__} with its own processor")
        side = foreign_side(teacher, config.data)
        keeps_head_gram = wants_head_gram(config.objective)
        alone = placed_foreign(config.teacher, world, teacher, side, keeps_head_gram=keeps_head_gram)
        if not alone.model.scaling.is_plain:
            say(f"its logits are {alone.model.scaling}; the student is compared with these")
        return FromTeacher(alone, head_loss=formula)
    is_packed = config.data.packing is not None
    frozen = placed_teacher(
        config.teacher,
        world,
        teacher,
        shares_tower=shares_tower,
        is_packed=is_packed,
        keeps_head_gram=wants_head_gram(config.objective),
    )
    say("the tower runs once for both models" if shares_tower else "each model runs its own tower")
    if (several := config.teacher.several) is not None:
        if others is None:
            raise ValueError("`teacher.several` names more teachers, but they were not loaded")

        def placed(settings: TeacherConfig, parts: Parts, *, shares_tower: bool) -> Teacher:
            return placed_teacher(settings, world, parts, shares_tower=shares_tower, is_packed=is_packed)

        return FromTeacher(others.join(frozen, placed, beta=several.beta), head_loss=formula)
    switch = lend(config, student[0], teacher, student[1], frozen.mllm)
    if weighing is not None:
        say("the teacher runs twice, with and without the picture")
        return visually_weighed(config.teacher, frozen, switch, student[1], formula)
    return FromTeacher(frozen, switch, head_loss=formula)


def cached_teacher(
    config: TrainConfig, teacher: AnyParts, device: torch.device, say: Callable[[str], None]
) -> CachedTeacher:
    """What predicts in the teacher's place."""
    assert config.teacher is not None
    say(f"the teacher's predictions come from {config.teacher.cache}")
    if config.teacher.cache is not None and not Manifest.read(Path(config.teacher.cache)).checksums:
        say(
            f"{config.teacher.cache} has no checksums of its head and index, and is used unchecked; run "
            "the same `llava-kd cache-teacher` command again to add them"
        )
    head = teacher.head
    if head.weight.is_meta:
        return CachedTeacher(None, None)
    # Its hidden states were stored with the factor of its logits in them; a LLaVA has neither that nor a cap.
    scaling = scaling_of(teacher.stock) if isinstance(teacher, ForeignParts) else Scaling()
    bias_U = None if head.bias is None else scaling.bias(head.bias.to(device))
    keeps_head_gram = wants_head_gram(config.objective)
    return CachedTeacher(head.weight.to(device), bias_U, cap=scaling.cap, keeps_head_gram=keeps_head_gram)


def say_left_out(
    config: TrainConfig, student: Parts, teacher: AnyParts, num_common: int, say: Callable[[str], None]
) -> None:
    """Name the tokens that only one side has. ValueError for a cache of logits that counts them in."""
    extra = left_out(student.tokenizer, teacher.tokenizer)
    if extra is None:
        return
    say(f"logits are compared over the first {num_common} tokens; left out: {extra} (student, teacher)")
    if config.teacher is None or config.teacher.cache is None:
        return
    contents = Manifest.read(Path(config.teacher.cache)).contents
    if contents.mode == "topk" and contents.columns != num_common:
        raise ValueError(
            f"the teacher cache {config.teacher.cache} stores logits over {contents.columns} tokens, but "
            f"only {num_common} are the same in student and teacher; write a cache with --mode hidden"
        )


def placed_teacher(
    settings: TeacherConfig,
    world: World,
    teacher: Parts,
    *,
    shares_tower: bool,
    is_packed: bool = False,
    keeps_head_gram: bool = False,
) -> Teacher:
    """The teacher where its settings want it, frozen; `is_packed`: it reads rows of several records."""
    dtype = DTYPES[settings.dtype]
    quantize_teacher(teacher, settings, compute_dtype=dtype)
    mllm = MLLM(teacher.stock)
    decoder, layers = mllm.language_model, mllm.language_model.layers
    if settings.placement == "fsdp":
        shard_layers(decoder, layers, world, dtype)
    if settings.placement == "cpu_offload":
        decoder.layers = torch.nn.ModuleList()  # they stay behind while the others move
    place(mllm, world.device, dict.fromkeys(PARTS, dtype))
    if settings.placement == "cpu_offload":
        decoder.layers = layers
        offload_layers(layers, world.device, dtype)
    choose_attention(mllm.language_model, world.device, dtype, whose="teacher", is_packed=is_packed)
    return Teacher(mllm, shares_tower=shares_tower, keeps_head_gram=keeps_head_gram)
