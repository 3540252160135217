"""The teacher of a stage as it is loaded: whole, or its head alone where a cache stands in for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from llava_kd.assembly.parts.models import DTYPES
from llava_kd.assembly.parts.objective import wants_head_gram
from llava_kd.assembly.parts.stored_teacher import HEAD
from llava_kd.assembly.settings import tables_of
from llava_kd.config import TrainConfig
from llava_kd.data.teacher_store.store import Manifest
from llava_kd.data.text.template_choice import Choice, choose
from llava_kd.distill.teaching.cached import CachedTeacher
from llava_kd.models.files.checkpoint import Parts, load_stock
from llava_kd.models.files.teacher_head import load_head_only
from llava_kd.models.fingerprint import weights_fingerprint
from llava_kd.models.towers.vision_tower import text_config
from llava_kd.models.vocabulary import left_out


def teacher_parts(config: TrainConfig) -> Parts | None:
    """The teacher that the settings name; where a cache stands in, its head, tokenizer and shapes alone."""
    if config.teacher is None:
        return None
    if config.teacher.cache is None:
        return load_stock(config.teacher.checkpoint, dtype=DTYPES[config.teacher.dtype])
    directory = Path(config.teacher.cache)
    Manifest.read(directory).check(directory, HEAD)
    try:
        head = load_file(directory / HEAD)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{directory / HEAD} cannot be read ({error}); the same `llava-kd cache-teacher` command writes "
            "it anew"
        ) from error
    return load_head_only(config.teacher.checkpoint, head["weight"], head.get("bias"))


def teacher_template(config: TrainConfig, teacher: Parts) -> Choice:
    """The template that the teacher is asked by, and why. ValueError where none can be guessed."""
    assert config.teacher is not None
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


def cached_teacher(
    config: TrainConfig, teacher: Parts, device: torch.device, say: Callable[[str], None]
) -> CachedTeacher:
    """What predicts in the teacher's place."""
    assert config.teacher is not None
    say(f"the teacher's predictions come from {config.teacher.cache}")
    if config.teacher.cache is not None and not Manifest.read(Path(config.teacher.cache)).checksums:
        say(
            f"{config.teacher.cache} is of a version without checksums of its head and index, and is "
            "trusted; the same `llava-kd cache-teacher` command adds them"
        )
    head = teacher.stock.lm_head
    bias_U = None if head.bias is None else head.bias.to(device)
    keeps_head_gram = wants_head_gram(config.objective)
    return CachedTeacher(head.weight.to(device), bias_U, keeps_head_gram=keeps_head_gram)


def say_left_out(
    config: TrainConfig, student: Parts, teacher: Parts, num_common: int, say: Callable[[str], None]
) -> None:
    """Name the tokens that only one side has. ValueError for a cache of logits that counts them in."""
    extra = left_out(student.processor.tokenizer, teacher.processor.tokenizer)
    if extra is None:
        return
    say(f"logits are compared over the first {num_common} tokens; left out are {extra} (student, teacher)")
    if config.teacher is None or config.teacher.cache is None:
        return
    contents = Manifest.read(Path(config.teacher.cache)).contents
    if contents.mode == "topk" and contents.columns != num_common:
        raise ValueError(
            f"the teacher cache {config.teacher.cache} holds logits over {contents.columns} tokens and "
            f"{num_common} are the same on both sides; write one with --mode hidden"
        )


def teacher_fingerprints(config: TrainConfig, teacher: Parts | None) -> dict[str, str]:
    """What a run relies on and does not save: the teacher's weights, or the cache of its predictions."""
    if teacher is None or config.teacher is None:
        return {}
    if config.teacher.cache is None:
        return {"teacher": weights_fingerprint(teacher.stock.state_dict())}
    manifest = Manifest.read(Path(config.teacher.cache))
    return {"teacher": manifest.identity["weights of the teacher"], "cache of the teacher": manifest.digest}
