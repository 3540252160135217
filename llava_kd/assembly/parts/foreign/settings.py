"""What of a stage's settings a teacher of another kind than LLaVA cannot serve, each refused by its name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain

from llava_kd.assembly.parts.objective import terms_of
from llava_kd.config import TrainConfig
from llava_kd.distill.terms.term import Term
from llava_kd.models.towers.visual_grid import VisualGrid


def refuse_settings(config: TrainConfig, kind: str, grid: VisualGrid | None) -> None:
    """ValueError for the first setting that a teacher of `kind`, a model's class, cannot serve.

    `grid`: of its visual tokens, None where none is known.
    """
    found = next(
        chain(_beyond(config), _terms_beyond(terms_of(config.objective), has_grid=grid is not None)), None
    )
    if found is not None:
        what, remedy = found
        raise ValueError(
            f"{what}, but `teacher.checkpoint` is a {kind}, not a LLaVA, and uses its own processor; {remedy}"
        )


def _beyond(config: TrainConfig) -> Iterator[tuple[str, str]]:
    teacher = config.teacher
    assert teacher is not None
    if teacher.template is not None:
        yield (
            f"`teacher.template` is {teacher.template}",
            "set it to null: the teacher uses its own chat template",
        )
    if teacher.several is not None:
        yield "`teacher.several` needs teachers that read the same tokens", "set it to null"
    if teacher.visual_dependency is not None:
        yield "`teacher.visual_dependency` changes the pixels of a LLaVA", "set it to null"
    if config.pictures is not None:
        yield "`pictures` changes the pixels that both models read", "set it to null"
    if config.on_policy is not None:
        yield "`on_policy` writes answers into the sequence of a LLaVA", "set it to null"
    if config.student.projector == "teacher":
        yield "`student.projector` is teacher, a LLaVA's", "set it to own"
    if config.data.decode == "nvjpeg":
        yield "`data.decode` is nvjpeg, which leaves pictures encoded", "set it to cpu"


def _terms_beyond(terms: Mapping[str, Term], *, has_grid: bool) -> Iterator[tuple[str, str]]:
    for name, term in terms.items():
        reads = term.reads
        if reads.teacher == "nothing" and reads.switched is None:
            continue
        if reads.teacher == "model" or reads.switched or reads.attention or reads.attended:
            yield f"`objective.{name}` reads inner states of the teacher", f"set objective.{name} to null"
        elif reads.projector:
            yield f"`objective.{name}` reads the teacher's projector", f"set objective.{name} to null"
        elif not has_grid and (reads.grids or "visual" in reads.places):
            yield (
                f"`objective.{name}` compares visual tokens one by one",
                f"set objective.{name} to null: the grid of its visual tokens is unknown",
            )
