"""What the terms of other methods need of both models, as the settings ask for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeVar

import torch
from torch import Tensor

from llava_kd.assembly.parts.models import DTYPES, compute_dtype
from llava_kd.assembly.parts.objective import carried, terms_of
from llava_kd.config import TrainConfig
from llava_kd.distill.teaching.switch import Switch
from llava_kd.distill.terms.term import Term
from llava_kd.models.attention.visual import middle_layers
from llava_kd.models.files.checkpoint import Parts
from llava_kd.models.foreign.loading import AnyParts, as_llava
from llava_kd.models.mllm import MLLM
from llava_kd.models.projectors.from_teacher import with_teacher_projector
from llava_kd.models.projectors.width_map import width_map
from llava_kd.models.towers.vision_tower import vision_config
from llava_kd.models.vocabulary import num_common_columns

T = TypeVar("T")


def with_projector(config: TrainConfig, student: Parts, teacher: AnyParts | None) -> Parts:
    """The student, with the teacher's projector where the settings ask for it."""
    if config.student.projector != "teacher" or teacher is None:
        return student
    whole = as_llava(teacher, "`student.projector: teacher`")
    return with_teacher_projector(student, whole, seed=config.seed)


def lend(
    config: TrainConfig, student: Parts, teacher: Parts, student_mllm: MLLM, teacher_mllm: MLLM
) -> Switch | None:
    """Let both placed models show what the terms compare, and give the switch where the settings ask for it.

    To be called before an engine shards the student, and after the kernels of attention are chosen.
    """
    assert config.teacher is not None
    terms = terms_of(config.objective)
    _watch(terms, student_mllm, compute_dtype(config))
    _watch(terms, teacher_mllm, DTYPES[config.teacher.dtype])
    _watch_answers(terms, teacher_mllm, DTYPES[config.teacher.dtype])
    _tap(teacher_mllm, {name: term.reads.teacher_taps for name, term in terms.items()}, "the teacher")
    return _switch(terms, student, teacher, teacher_mllm, config.data.visual_alignment)


def _watch(terms: Mapping[str, Term], model: MLLM, dtype: torch.dtype) -> None:
    shares = _agreed({name: term.reads.attention for name, term in terms.items()}, "the attention of")
    if shares is not None:
        model.watch_attention(middle_layers(len(model.language_model.layers), *shares), dtype)


def _watch_answers(terms: Mapping[str, Term], teacher: MLLM, dtype: torch.dtype) -> None:
    asked = {name: term.reads.attended for name, term in terms.items()}
    if (read := _agreed(asked, "what the teacher attends to in")) is not None:
        first, last, by = read
        num_layers = len(teacher.language_model.layers)
        layers = middle_layers(num_layers, first, last, setting="objective.visual_kl")
        teacher.watch_answers(layers, dtype, by=by)


def tap_student(config: TrainConfig, student_mllm: MLLM) -> None:
    """Let the student show what goes through the modules that terms name. ValueError where it has none."""
    terms = terms_of(config.objective)
    _tap(student_mllm, {name: term.reads.student_taps for name, term in terms.items()}, "the student")


def tap_both(config: TrainConfig, student_mllm: MLLM, its: TrainConfig, peer_mllm: MLLM) -> None:
    """Let two students show what either objective reads of them; `its` is the stage as the peer sees it."""
    for own, other, mllm, whose in (
        (config, its, student_mllm, "the student"),
        (its, config, peer_mllm, "the peer"),
    ):
        asked = {name: term.reads.student_taps for name, term in terms_of(own.objective).items()}
        for name, term in terms_of(other.objective).items():
            asked[name] = (*asked[name], *term.reads.teacher_taps)
        _tap(mllm, asked, whose)


def _tap(model: MLLM, asked: Mapping[str, tuple[str, ...]], whose: str) -> None:
    names = [name for name, taps in asked.items() if taps]
    if not names:
        return
    try:
        model.watch_taps([tap for taps in asked.values() for tap in taps])
    except ValueError as error:
        raise ValueError(f"{' and '.join(names)} reads {whose}: {error}") from error


def _agreed(asked: Mapping[str, T | None], what: str) -> T | None:
    """What the terms ask for. ValueError where two ask for two things: there is one of it."""
    found = {name: value for name, value in asked.items() if value is not None}
    if len(set(found.values())) > 1:
        listed = " and ".join(f"{name} reads {what} {value}" for name, value in found.items())
        raise ValueError(
            f"{listed}: all terms of a run must use the same one; set them to the same value, or remove a "
            "term"
        )
    return next(iter(found.values()), None)


def _switch(
    terms: Mapping[str, Term],
    student: Parts,
    teacher: Parts,
    teacher_mllm: MLLM,
    visual_alignment: Literal["refuse", "resample"],
) -> Switch | None:
    """Raises ValueError where the student's visual output cannot stand in the teacher's places."""
    asked: dict[str, Literal["tower", "projector"] | None] = {n: t.reads.switched for n, t in terms.items()}
    source = _agreed(asked, "the switch from the")
    if source is None:
        return None
    map_DE = None
    if source == "tower":
        widths = [vision_config(parts.stock.config).hidden_size for parts in (student, teacher)]
        if widths[0] != widths[1]:
            raise ValueError(
                f"the student's tower has width {widths[0]}, but the teacher's projector needs "
                f"{widths[1]}: set objective.visual_switch.source to projector, or use a tower of that "
                "width"
            )
    else:
        common = num_common_columns(
            student.processor.tokenizer,
            teacher.processor.tokenizer,
            student_rows=student.stock.lm_head.weight.shape[0],
            teacher_rows=teacher.stock.lm_head.weight.shape[0],
        )
        map_DE = width_map(_embeddings(student, common), _embeddings(teacher, common))
        map_DE = map_DE.to(teacher.stock.lm_head.weight.device)
    grids = student.visual_grid, teacher.visual_grid
    refusal = (
        f"visual_switch needs equal grids, but would put the student's {grids[0]} in place of the "
        f"teacher's {grids[1]}"
    )
    return Switch(
        teacher=teacher_mllm,
        source=source,
        align=carried(*grids, visual_alignment, refusal=refusal, onto="teacher"),
        width_map_DE=map_DE,
    )


@torch.no_grad()
def _embeddings(parts: Parts, num_tokens: int) -> Tensor:
    """What the language model reads for each of the first tokens, as its own scale makes it."""
    table = parts.stock.get_input_embeddings()
    return table(torch.arange(num_tokens, device=parts.stock.lm_head.weight.device))
