"""Whether the models of a stage look at pictures: their loss with their own pictures and with others'."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from llava_kd.assembly.parts.data import side_in
from llava_kd.assembly.parts.teacher import is_cached, placed_teacher
from llava_kd.assembly.record_pass import answer_rows
from llava_kd.batch import Batch
from llava_kd.config import StudentConfig, TeacherConfig, TrainConfig
from llava_kd.curation.likelihoods import answer_sums
from llava_kd.data.batches.loader import Loader
from llava_kd.data.batches.model_side import Side
from llava_kd.data.batches.order import Order, Reading
from llava_kd.data.sources.conversation import Source
from llava_kd.distill.picture_gain import with_exchanged_pictures
from llava_kd.distill.teaching.live import Teacher
from llava_kd.models.files.checkpoint import Parts
from llava_kd.models.foreign.loading import AnyParts, ForeignParts
from llava_kd.parallel.world import World

UNASKED = 32  # records that are scored unless the user says how many
MOST_ON_A_CPU = 500e6  # parameters of a model that is scored unasked without a GPU
SURE = 2.0  # standard errors


def picture_lines(
    config: TrainConfig, student: Parts, teacher: AnyParts | None, source: Source, asked: int | None
) -> Iterator[str]:
    """Lines about each model that has learned something. The last look at them: they are moved and recast.

    `asked` None: `UNASKED` records, and no large model on a CPU.
    """
    models: list[tuple[str, Parts, StudentConfig | TeacherConfig]] = []
    if isinstance(teacher, ForeignParts):
        yield "pictures         teacher not scored with exchanged pictures: it has its own processor"
    elif teacher is not None and config.teacher is not None and not is_cached(config):
        models.append(("teacher", teacher, config.teacher))
    if config.student.checkpoint is not None:
        models.append(("student", student, config.student))
    device = torch.device("cuda" if torch.cuda.is_available() and config.engine.device != "cpu" else "cpu")
    for whose, parts, its in models:
        size = sum(p.numel() for p in parts.stock.parameters())
        if asked is None and device.type == "cpu" and size > MOST_ON_A_CPU:
            yield (
                f"pictures         {whose} not scored with exchanged pictures: {size / 1e9:.1f} B "
                f"parameters on a CPU; use --pictures={UNASKED} to do it"
            )
        elif count := (UNASKED if asked is None else asked):
            yield from _of_model(config, whose, parts, its, source, count, device)


def _of_model(
    config: TrainConfig,
    whose: str,
    parts: Parts,
    its: StudentConfig | TeacherConfig,
    source: Source,
    count: int,
    device: torch.device,
) -> Iterator[str]:
    settings = its if isinstance(its, TeacherConfig) else TeacherConfig(checkpoint="", dtype="float32")
    settings = replace(settings, placement="replicated")
    world = World(rank=0, size=1, device=device)
    predict = placed_teacher(settings, world, parts, shares_tower=False)
    loader = _loader(config, source, side_in(config, parts, its), count, device)
    own, other = _losses(predict, loader)
    if len(own) < 2:
        yield f"pictures         {whose}: fewer than 2 of the sampled records have a picture"
        return
    gains = [b - a for a, b in zip(own, other, strict=True)]
    gain, error = statistics.fmean(gains), statistics.stdev(gains) / len(gains) ** 0.5
    yield (
        f"pictures         {whose}: {statistics.fmean(own):.3f} nats per token with its own picture, "
        f"{statistics.fmean(other):.3f} with another one: {gain:+.3f} +- {error:.3f} ({len(own)} records)"
    )
    if gain <= SURE * error:
        yield (
            f"  warning        the {whose}'s answers do not show that it uses the pictures: with another "
            "picture its loss does not rise significantly. Score more records with --pictures=N. If this "
            "persists, its projector is untrained, or its tower, layer or image processor differs from "
            "its training"
        )


def _loader(config: TrainConfig, source: Source, reader: Side, count: int, device: torch.device) -> Loader:
    chosen = np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).astype(int)).tolist()
    size = min(len(chosen), max(2, config.micro_batch_size))
    return Loader(
        source=source,
        student=reader,
        teacher=None,
        order=Order(seed=0, global_batch_size=size, micro_batch_size=size, records=chosen),
        reading=Reading(max_bad_rate=1.0),
        device=device,
    )


@torch.no_grad()
def _losses(predict: Teacher, loader: Loader) -> tuple[list[float], list[float]]:
    """Mean -log p of the answers of each record with a picture to exchange: with its own, with another's."""
    own: list[float] = []
    other: list[float] = []
    for batches in loader.batches(0, loader.steps_per_epoch):
        for batch in batches:
            inputs = batch.student
            if len(inputs.places.valid_images_N) < 2:
                continue
            has_picture = inputs.distilled_visual_BT.any(1).tolist()
            exchanged = replace(batch, student=with_exchanged_pictures(inputs))
            for losses, read in ((own, batch), (other, exchanged)):
                losses += _means(predict, read, has_picture)
    return own, other


def _means(predict: Teacher, batch: Batch, has_picture: list[bool]) -> list[float]:
    sums = answer_sums(answer_rows(predict(batch), batch), batch.student)
    return [nll / tokens for (nll, tokens), has in zip(sums, has_picture, strict=True) if has and tokens]
