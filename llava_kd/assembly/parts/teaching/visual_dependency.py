"""Tokens that need the picture, as the settings weigh them."""

from __future__ import annotations

from llava_kd.assembly.parts.objective import terms_of
from llava_kd.config import TeacherConfig, TrainConfig
from llava_kd.distill.head_terms import head_requests
from llava_kd.distill.teaching.visual_dependency import Weighing


def weighing(teacher: TeacherConfig) -> Weighing:
    """Of a teacher whose settings ask for it."""
    settings = teacher.visual_dependency
    assert settings is not None
    return Weighing(
        by=settings.by,
        picture=settings.picture,
        cells=settings.cells,
        top=settings.top,
        mass=settings.mass,
    )


def check_visual_dependency(config: TrainConfig) -> None:
    """ValueError where no term compares response tokens, whose divergence alone is weighed."""
    if config.teacher is None or config.teacher.visual_dependency is None:
        return
    requests = head_requests(terms_of(config.objective)).values()
    if not any(r.place == "response" and r.divergence is not None for r in requests):
        raise ValueError(
            "`teacher.visual_dependency` weighs response_kl, which `objective` has not; add it, or set "
            "teacher.visual_dependency to null"
        )
