"""A look before a long run: vocabulary, towers, template and labels, a sample of the data, and the plan."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from llava_kd.assembly.parts.cross.words import with_words
from llava_kd.assembly.parts.data import same_tower, side_in, source_in
from llava_kd.assembly.parts.foreign.teachers import describe, foreign_side, placed_foreign
from llava_kd.assembly.parts.lending import with_projector
from llava_kd.assembly.parts.models import choose_attention, student_in
from llava_kd.assembly.parts.objective import objective
from llava_kd.assembly.parts.several.teachers import check_several, other_teachers
from llava_kd.assembly.parts.slices import read_slices
from llava_kd.assembly.parts.stored_teacher import open_cache
from llava_kd.assembly.parts.teacher import is_cached, teacher_parts, teacher_template
from llava_kd.assembly.parts.teaching.peer import mirrored, peer_terms
from llava_kd.assembly.parts.teaching.visual_dependency import check_visual_dependency
from llava_kd.assembly.parts.tuning.centroids import with_centroids
from llava_kd.assembly.planning.dry_run import plan
from llava_kd.assembly.planning.pictures import picture_lines
from llava_kd.assembly.planning.throughput import Network
from llava_kd.assembly.settings import tables_of
from llava_kd.batch import IGNORE_INDEX
from llava_kd.config import TrainConfig
from llava_kd.data.pixels.compiled import resizer
from llava_kd.data.pixels.images import MAX_PIXELS, decode, jpeg_decoder
from llava_kd.data.sources.conversation import Source
from llava_kd.models.files.checkpoint import Parts
from llava_kd.models.files.other_tools import unopened
from llava_kd.models.foreign.loading import AnyParts
from llava_kd.models.vocabulary import left_out
from llava_kd.parallel.world import World


def check(
    config: TrainConfig,
    *,
    ranks: int,
    num_records: int,
    num_pictures: int | None = None,
    measured: str | None = None,
    network: Network | None = None,
) -> str:
    """Lines about the models, a sample of the records and the plan.

    `num_pictures` records are scored with each other's pictures; None: some, where that takes little time.

    Raises ValueError for what `train` would refuse, and if more of the sample is bad than it would allow.
    """
    read_slices(config)
    check_several(config)
    check_visual_dependency(config)
    source = source_in(config)
    lines = [f"plug-in          {p.name}, sha256 {p.sha256[:16]}" for p in tables_of(config).plugins]
    student = student_in(config, lambda line: lines.append(f"template         of the student: {line}"))
    teacher = teacher_parts(config)
    student = with_projector(config, student, teacher)
    _keeps_records_apart(config, student, "student")
    if isinstance(teacher, Parts) and not is_cached(config):
        _keeps_records_apart(config, teacher, "teacher")
    peer = _peer(config, student, lines)
    other, whose = (teacher, "teacher") if peer is None else (peer, "peer")
    terms = objective(config.objective, student, other, config.data.visual_alignment)
    terms = with_centroids(config, terms, student, source)
    terms = with_words(config, terms, student, teacher, lambda line: lines.append(f"vocabulary       {line}"))
    if teacher is not None:
        lines.append(f"template         of the teacher: {teacher_template(config, teacher)}")
        other_teachers(
            config, student, teacher, source, lambda line: lines.append(f"several          {line}")
        )
    if other is not None:
        lines += _pictures_of(config, student, other, whose)
        if terms.common.num_common is not None:
            extra = left_out(student.tokenizer, other.tokenizer)
            without = "" if extra is None else f"; left out: {extra}"
            lines.append(f"vocabulary       {terms.common.num_common} shared tokens{without}")
    lines.append(f"pixels           {_pixels(config)}")
    lines += [f"not for          {line}" for line in unopened(student)]
    lines += _sample(config, student, source, num_records)
    lines += picture_lines(config, student, teacher, source, num_pictures)
    return "\n".join([*lines, plan(config, ranks, measured, network)])


def _peer(config: TrainConfig, student: Parts, lines: list[str]) -> Parts | None:
    """The peer, if there is one. ValueError where one of the two cannot learn from the other."""
    if config.peer is None:
        return None
    its = mirrored(config)
    peer = student_in(its, lambda line: lines.append(f"template         of the peer: {line}"))
    _keeps_records_apart(its, peer, "peer")
    peer_terms(its, peer, student)
    return peer


def _pictures_of(config: TrainConfig, student: Parts, other: AnyParts, whose: str) -> list[str]:
    """How both models see pictures. The answers of a teacher with its own processor are tried here."""
    mine = f"visual tokens    student {student.tokens_per_image}, {whose}"
    if isinstance(other, Parts):
        return [f"towers           {_towers(config, student, other)}", f"{mine} {other.tokens_per_image}"]
    assert config.teacher is not None
    side = foreign_side(other, config.data)
    lines = [f"teacher          {type(other.stock).__name__}, read by its {type(other.processor).__name__}"]
    if is_cached(config):
        cache = open_cache(config, side, source_in(config))
        lines.append(
            f"towers           only the student's: the teacher's predictions come from {cache.directory}"
        )
    else:
        here = World(rank=0, size=1, device=torch.device("cpu"))
        placed_foreign(replace(config.teacher, placement="replicated", quantize=None), here, other, side)
        lines.append("towers           different: both run")
    return [*lines, f"{mine} {describe(other, side)[1]}"]


def _keeps_records_apart(config: TrainConfig, parts: Parts, whose: str) -> None:
    """ValueError for a language model that reads records of a batch or a row otherwise than alone."""
    model, is_packed = parts.stock.model.language_model, config.data.packing is not None
    choose_attention(model, torch.device("cpu"), parts.stock.dtype, whose=whose, is_packed=is_packed)


def _towers(config: TrainConfig, student: Parts, teacher: Parts) -> str:
    if config.teacher is not None and config.teacher.cache is not None:
        reader = side_in(config, teacher, config.teacher)
        source = source_in(config)
        cache = open_cache(config, reader, source)
        return f"only the student's: the teacher's predictions come from {cache.directory}"
    return "the same: it runs once" if same_tower(config, student, teacher) else "different: both run"


def _pixels(config: TrainConfig) -> str:
    resized = f"{resizer()}, exactly" if config.data.resize == "exact" else "PyTorch's quick kernel"
    return f"on the CPU, JPEGs are decoded by {jpeg_decoder()} and images are resized by {resized}"


def _sample(config: TrainConfig, student: Parts, source: Source, num_records: int) -> list[str]:
    reader = side_in(config, student, config.student)
    encode = reader.encoder()
    chosen = np.linspace(0, len(source) - 1, min(num_records, len(source))).astype(int).tolist()
    lengths, bad, shown = [], [], ""
    for i in chosen:
        record = source.record(i)
        try:
            encoded = encode(record)
            for k in range(len(record.images)):
                decode(source.image_bytes(i, k), max_pixels=MAX_PIXELS)
        except (ValueError, OSError) as error:
            bad.append(f"{record.id}: {error}")
            continue
        lengths.append(len(encoded.ids))
        answers: torch.Tensor = encoded.ids[encoded.labels != IGNORE_INDEX]
        shown = shown or f"record {record.id} is trained on {reader.tokenizer.decode(answers)!r}"
    if len(bad) > max(3, config.data.max_bad_rate * len(chosen)):
        raise ValueError(
            f"{len(bad)} of {len(chosen)} sampled records are bad; fix them, or raise data.max_bad_rate:"
            + "".join(f"\n  {line}" for line in bad[:20])
        )
    longest, mean = (max(lengths), float(np.mean(lengths))) if lengths else (0, 0.0)
    counts = f"{len(chosen)} records, {len(bad)} bad"
    return [
        f"sample           {counts}; tokens: {mean:.0f} on average, {longest} at most",
        *(f"  bad            {line}" for line in bad),
        f"labels           {shown}",
    ]
