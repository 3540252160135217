"""Objectives for tests, by the names of their terms."""

from __future__ import annotations

from dataclasses import replace

from llava_kd.distill.formulas import FORMULAS, Align, Common
from llava_kd.distill.objective import Objective
from llava_kd.distill.terms import TERMS
from llava_kd.distill.terms.term import Term
from llava_kd.losses.tuning.information import Centroids


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


def changed(before: Objective, **terms: Term | None) -> Objective:
    """The same with other terms; None is off."""
    return replace(before, terms=_on({**before.terms, **terms}))


def among(before: Objective, *names: str) -> Objective:
    """The same with these terms alone."""
    return replace(before, terms={name: term for name, term in before.terms.items() if name in names})


def _on(terms: dict[str, Term | None]) -> dict[str, Term]:
    order = [*TERMS, *(name for name in terms if name not in TERMS)]
    return {name: term for name in order if (term := terms.get(name)) is not None}
