"""Objectives for tests, by the names of their terms."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from llava_kd.distill.formulas import FORMULAS, Align, Common
from llava_kd.distill.objective import Objective
from llava_kd.distill.terms import TERMS
from llava_kd.distill.terms.term import Term, Widths
from llava_kd.losses.tuning.information import Centroids
from llava_kd.models.mllm import MLLM
from llava_kd.models.taps import tapped_widths
from llava_kd.models.towers.stages import on_visual_tokens
from llava_kd.models.towers.vision_tower import num_prefix_tokens
from llava_kd.models.towers.visual_grid import visual_grid


def objective_of(
    *,
    num_common: int | None = None,
    align: Align | None = None,
    losses: str = "reference",
    centroids: Centroids | None = None,
    **terms: Term | None,
) -> Objective:
    """Terms that are None are off; the others stand in the order of the table."""
    common = Common(num_common=num_common, align=align, centroids=centroids, formulas=FORMULAS[losses])
    return Objective(terms=_on(terms), common=common)


def furnished(objective: Objective, student: MLLM, teacher: MLLM, seed: int = 0) -> Objective:
    """With the weights that its terms bring; both models show what its taps read."""
    reads = [term.reads for term in objective.terms.values()]
    ours = [tap for read in reads for tap in read.student_taps]
    theirs = [tap for read in reads for tap in read.teacher_taps]
    student.watch_taps(ours)
    teacher.watch_taps(theirs)
    widths = Widths(
        student=student.lm_head.weight.shape[1],
        teacher=teacher.lm_head.weight.shape[1],
        student_taps=tapped_widths(student.stock, ours),
        teacher_taps=tapped_widths(teacher.stock, theirs),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = {name: term.module(widths) for name, term in objective.terms.items()}
    prefix, grid = num_prefix_tokens(student.stock.config), visual_grid(student.stock.config)
    align = functools.partial(on_visual_tokens, prefix=prefix, target=grid)
    return replace(
        objective,
        common=replace(objective.common, stage_align=align),
        modules={name: module for name, module in made.items() if module is not None},
    )


def changed(before: Objective, **terms: Term | None) -> Objective:
    """The same with other terms; None is off."""
    return replace(before, terms=_on({**before.terms, **terms}))


def among(before: Objective, *names: str) -> Objective:
    """The same with these terms alone."""
    return replace(before, terms={name: term for name, term in before.terms.items() if name in names})


def _on(terms: dict[str, Term | None]) -> dict[str, Term]:
    order = [*TERMS, *(name for name in terms if name not in TERMS)]
    return {name: term for name in order if (term := terms.get(name)) is not None}
