"""Which operations a stage's models do in a step: what `tflop_per_s` and `mfu` in its log are made of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch

from llava_kd.batch import Batch, Inputs
from llava_kd.config import TeacherConfig
from llava_kd.distill.head_terms import head_requests
from llava_kd.distill.teaching.peer import exchanged
from llava_kd.distill.terms.term import Term
from llava_kd.models.files.checkpoint import Parts
from llava_kd.models.flops import Backward, Flops, head_rows, of_tower, peak_of
from llava_kd.models.foreign.loading import AnyParts
from llava_kd.models.towers.vision_tower import input_size
from llava_kd.training.measuring.operations import PEAKS

Count = Callable[[Batch], float]


def operations(
    student: Parts,
    teacher: AnyParts | None,
    settings: TeacherConfig | None,
    terms: Mapping[str, Term],
    *,
    shares_tower: bool,
) -> dict[str, Count]:
    """Those of a micro-batch, by whose they are; before an engine has sharded the models.

    `student` is as it trains; `shares_tower`: one tower runs for both models. Of a cached teacher its head is
    counted where the cache holds states. Of several teachers, the first; of one that is no LLaVA, none: how
    many tiles its processor makes of a picture is not known here. A peer comes as a teacher without
    `settings`, and trains as the student does.
    """
    requests = head_requests(terms).values()
    read = {request.place for request in requests}
    found = {"student": _of_student(student, read)}
    if isinstance(teacher, Parts) and settings is None:
        of_peer = _of_student(teacher, read, shares_tower=shares_tower)
        found["peer"] = lambda batch: of_peer(exchanged(batch))
    if isinstance(teacher, Parts) and settings is not None:
        places = {request.place for request in requests if request.divergence is not None}
        found["teacher"] = _of_teacher(teacher, places, settings, shares_tower=shares_tower)
        if settings.visual_dependency is not None and settings.visual_dependency.gamma > 0:
            trained, again = found["student"], _asked_again(student, readings=1)
            found["student"] = lambda batch: trained(batch) + again(batch.student)
    return found


def peak(device: torch.device) -> float | None:
    """Operations a second that the device can do; None where that is not known."""
    return peak_of(torch.cuda.get_device_name(device), PEAKS) if device.type == "cuda" else None


def _of_student(student: Parts, places: Collection[str], *, shares_tower: bool = False) -> Count:
    flops, tower = Flops.of(student.stock), 0.0 if shares_tower else _tower(student)
    backward = Backward.of(dict(student.stock.named_parameters(remove_duplicate=False)))
    return lambda batch: flops.of_inputs(
        batch.student, head_rows=head_rows(batch.student, places), tower_image=tower, backward=backward
    )


def _of_teacher(
    teacher: Parts, places: Collection[str], settings: TeacherConfig, *, shares_tower: bool
) -> Count:
    flops = Flops.of(teacher.stock)
    tower = 0.0 if shares_tower or settings.cache is not None else _tower(teacher)
    again = None if settings.visual_dependency is None else _asked_again(teacher, readings=2)

    def count(batch: Batch) -> float:
        inputs = batch.teacher_inputs
        rows = head_rows(inputs, places)
        if settings.cache is None:
            once = flops.of_inputs(inputs, head_rows=rows, tower_image=tower)
            return once if again is None else once + again(inputs)
        holds_states = batch.teacher_rows is not None and batch.teacher_rows.hidden_ME is not None
        return rows * flops.row * holds_states

    return count


def _asked_again(parts: Parts, *, readings: int) -> Callable[[Inputs], float]:
    """Without the picture, by a forward alone; `readings` of the responses go through the head for it."""
    flops, tower = Flops.of(parts.stock), _tower(parts)
    return lambda inputs: flops.of_inputs(
        inputs, head_rows=readings * head_rows(inputs, {"response"}), tower_image=tower
    )


def _tower(parts: Parts) -> float:
    return of_tower(parts.stock.model.vision_tower, *input_size(parts.processor.image_processor))
