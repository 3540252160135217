"""Tokens that need the picture, as the settings weigh them."""

from __future__ import annotations

from collections.abc import Callable

from llava_kd.assembly.parts.objective import terms_of
from llava_kd.config import TeacherConfig, TrainConfig
from llava_kd.distill.head_terms import head_requests
from llava_kd.distill.teaching.live import Teacher
from llava_kd.distill.teaching.switch import Switch
from llava_kd.distill.teaching.visual_dependency import VisuallyWeighed, Weighing
from llava_kd.losses.reference import HeadLoss
from llava_kd.models.mllm import MLLM


def visually_weighed(
    teacher: TeacherConfig,
    frozen: Teacher,
    switch: Switch | None,
    student: MLLM,
    head_loss: Callable[..., HeadLoss],
) -> VisuallyWeighed:
    """The teacher whose settings ask for it, behind the door; `student` as it is placed."""
    weighing = weighing_of(teacher)
    assert weighing is not None
    asked = student if weighing.gamma > 0 else None
    return VisuallyWeighed(weighing, frozen, switch, student=asked, head_loss=head_loss)


def weighing_of(teacher: TeacherConfig) -> Weighing | None:
    """None where all response tokens weigh alike."""
    settings = teacher.visual_dependency
    if settings is None:
        return None
    return Weighing(
        by=settings.by,
        picture=settings.picture,
        cells=settings.cells,
        top=settings.top,
        mass=settings.mass,
        gamma=settings.gamma,
    )


def stored_form(teacher: TeacherConfig) -> str | None:
    """How a cache finds the scores that these settings weigh by, in words: what they depend on.

    How much a token then weighs is no part of it, and is free to change. ValueError for what no score gives.
    """
    settings = teacher.visual_dependency
    if settings is None:
        return None
    if settings.gamma > 0:
        raise ValueError(
            "a cache stores only one number per token of the teacher's prediction without the picture, "
            f"but `teacher.visual_dependency.gamma` {settings.gamma:g} needs the whole prediction; set "
            "gamma to 0"
        )
    cells = "" if settings.picture == "grey" else f" at {settings.cells} x {settings.cells}"
    return f"{settings.by}, {settings.picture}{cells}"


def check_visual_dependency(config: TrainConfig) -> None:
    """ValueError where no term compares response tokens, or not as the settings need it."""
    if config.teacher is None or config.teacher.visual_dependency is None:
        return
    requests = head_requests(terms_of(config.objective)).items()
    compared = {name: r for name, r in requests if r.place == "response" and r.divergence is not None}
    if not compared:
        raise ValueError(
            "`teacher.visual_dependency` weights response_kl, which `objective` does not have; add it, or "
            "set teacher.visual_dependency to null"
        )
    for name, request in compared.items() if config.teacher.visual_dependency.gamma > 0 else ():
        assert request.divergence is not None
        kind = request.divergence.kind
        if kind not in ("forward", "reverse") or isinstance(request.temperature, str):
            raise ValueError(
                "`teacher.visual_dependency.gamma` needs divergence forward or reverse, and a number as "
                f"temperature, in `objective.{name}`; got {kind}, {request.temperature}: change them, or "
                "set gamma to 0"
            )
