"""Every term with every option, on micro-batches with and without images: finite, and no weight left out.

Shape legend: I images, M teacher tokens of an image, E teacher width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from tiny_batches import TinyRecord, inputs, record
from tiny_llava import make_tiny_llava
from tiny_objectives import furnished, objective_of
from torch import Tensor

from llava_kd.batch import Batch
from llava_kd.distill.student import Student
from llava_kd.distill.taught import Taught
from llava_kd.distill.teaching.from_teacher import FromTeacher
from llava_kd.distill.teaching.live import Teacher
from llava_kd.distill.teaching.switch import Switch
from llava_kd.distill.terms import TERMS
from llava_kd.distill.terms.term import Term
from llava_kd.distill.terms.visual_kl import VisualKL
from llava_kd.distill.terms.visual_switch import VisualSwitch
from llava_kd.losses.tuning.information import Centroids
from llava_kd.models.files.checkpoint import load_stock
from llava_kd.models.mllm import MLLM, PARTS
from llava_kd.models.projectors.width_map import width_map
from llava_kd.models.towers.visual_grid import VisualGrid, resample

COMMON = 260
SMALL, LARGE = VisualGrid(rows=4, columns=4), VisualGrid(rows=5, columns=5)


BESIDE = {"looked_at_by": {"weighed": True}}  # what a setting is refused without


def options(kind: type[Term]) -> Iterator[tuple[str, Term]]:
    """A term of the table with each choice that one setting gives, the others as they are by default.

    All that are on or off are on in one more; formulas are compared in their own tests in every combination.
    """
    hints = {f.name: get_type_hints(kind)[f.name] for f in fields(kind)}
    choices = {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}
    choices |= {name: (False, True) for name, hint in hints.items() if hint is bool}
    heat = {"temperature": 2.0} if "temperature" in hints else {}
    alone = [{name: value} | BESIDE.get(name, {}) for name, values in choices.items() for value in values]
    together = [{name: True for name, hint in hints.items() if hint is bool}]
    for named in [{}, *alone, *together]:
        term = kind(**named, **heat)
        if named == {} or term != kind(**heat):
            yield " ".join(f"{name}={value}" for name, value in named.items()), term


CASES: dict[str, dict[str, Term]] = {
    f"{name} {chosen}".strip(): {name: term} for name, kind in TERMS.items() for chosen, term in options(kind)
}
CASES["visual_kl share=0.3"] = {"visual_kl": VisualKL(share=0.3)}
CASES["all"] = {name: kind() for name, kind in TERMS.items()} | {
    "visual_switch": VisualSwitch(source="projector")
}
CASES["all, another divergence"] = CASES["all"] | {"visual_kl": VisualKL(divergence="jsd")}
CASES["all, the switch from the tower"] = CASES["all"] | {"visual_switch": VisualSwitch(source="tower")}
# What the batch holds: images and answers, no image, nothing to learn from, and what could not be read.
KINDS: dict[str, list[dict]] = {
    "images": [{"images": 2}, {}],
    "images and text": [{}, {"images": 0}],
    "text only": [{"images": 0}, {"images": 0, "answer": 2}],
    "all masked": [{"answer": 0}],
    "text, all masked": [{"images": 0, "answer": 0}],
    "bad image": [{"is_valid": False}],
    "bad image and bad text": [{"is_valid": False}, {"images": 0, "is_valid": False}],
}
# A teacher of random weights is never right nor near the student, and a wider one is nowhere the less sure.
UNTAUGHT = {"response_kl trust=first", "response_kl trust=choice_listed", "visual_regions trust=worse"}
SILENT = {"text, all masked", "bad image", "bad image and bad text"}


@dataclass(frozen=True, kw_only=True)
class Sides:
    student: MLLM
    teacher: Teacher
    is_resampled: bool

    def batch(self, *rows: dict, first: int = 0) -> Batch:
        """Records of these kinds, drawn by their number, which begins at `first`."""

        def side(tokens: int, size: int) -> list[TinyRecord]:
            made = [record(seed, tokens=tokens, **row) for seed, row in enumerate(rows, start=first)]
            return [replace(item, pixels_ICHW=sized(item.pixels_ICHW, size)) for item in made]

        names = tuple(f"r{number}" for number in range(len(rows)))
        if not self.is_resampled:
            return Batch(student=inputs(*side(16, 32)), record_ids=names)
        return Batch(student=inputs(*side(25, 40)), teacher=inputs(*side(16, 32)), record_ids=names)

    def switch(self, source: str) -> Switch:
        tables = [
            side.language_model.embed_tokens.weight[:COMMON] for side in (self.student, self.teacher.mllm)
        ]
        return Switch(
            teacher=self.teacher.mllm,
            source="tower" if source == "tower" else "projector",
            align=partial(resample, source=LARGE, target=SMALL) if self.is_resampled else None,
            width_map_DE=None if source == "tower" else width_map(tables[0].detach(), tables[1].detach()),
        )

    def run(self, terms: dict[str, Term], losses: str, *batches: Batch) -> dict[str, Tensor]:
        """Gradients of the step, and its loss beside them."""
        align = partial(resample, source=SMALL, target=LARGE) if self.is_resampled else None
        rows = self.student.lm_head.weight.shape[0]
        uniform_KV = torch.full((rows, rows), 1 / rows)  # every label has one
        centroids = Centroids.of(torch.arange(rows), uniform_KV)
        objective = objective_of(num_common=COMMON, align=align, losses=losses, centroids=centroids, **terms)
        objective = furnished(objective, self.student, self.teacher.mllm)
        source = source_of(terms)
        switch = None if source is None else self.switch(source)
        module = Student(self.student, objective, FromTeacher(self.teacher, switch))
        module.zero_grad()
        counts = reduce(add, map(objective.counts, batches))
        total = torch.zeros(())
        for batch in batches:
            taught = Taught(prediction=self.teacher(batch) if objective.needs_teacher else None)
            loss, means = module(batch, counts, taught=taught)
            assert means.keys() == terms.keys()
            assert all(bool(mean.isfinite()) for mean in means.values()), means
            loss.backward()
            total = total + loss.detach()
        found = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
        missed = [name for name, gradient in found.items() if gradient is None]
        assert not missed, f"no gradient reaches {missed}"
        return {"loss": total, **{name: g.clone() for name, g in found.items() if g is not None}}

    def skip_if_refused(self, terms: dict[str, Term]) -> None:
        if source_of(terms) == "tower" and not self.student.train_tower:
            pytest.skip("refused by the settings: it could move nothing")
        if any(getattr(term, "map", None) == "never" for term in terms.values()):
            pytest.skip("refused: the models are of other widths")


def source_of(terms: dict[str, Term]) -> str | None:
    return next((term.reads.switched for term in terms.values() if term.reads.switched is not None), None)


def sized(pixels_ICHW: Tensor, size: int) -> Tensor:
    """The same noise for either side; bilinear, so that both see one picture."""
    if not len(pixels_ICHW):
        return pixels_ICHW.new_zeros(0, 3, size, size)
    return torch.nn.functional.interpolate(pixels_ICHW, size=(size, size), mode="bilinear")


@pytest.fixture(
    scope="module",
    params=[(tower, other) for tower in (False, True) for other in (False, True)],
    ids=["frozen tower", "frozen tower, other grid", "trained tower", "trained tower, other grid"],
)
def sides(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sides:
    trains_tower, is_resampled = request.param
    root: Path = tmp_path_factory.mktemp("matrix")
    ours = make_tiny_llava(root / "s", hidden=32, layers=3, image_size=40 if is_resampled else 32, seed=4)
    theirs = make_tiny_llava(root / "t", hidden=48, layers=4, vocab_size=280, seed=3)
    student = MLLM(load_stock(str(ours)).stock, trainable=PARTS if trains_tower else PARTS[1:])
    teacher = MLLM(load_stock(str(theirs)).stock)
    student.watch_attention(range(1, 2))
    teacher.watch_attention(range(1, 3))
    teacher.watch_answers(range(1, 3))
    return Sides(student=student, teacher=Teacher(teacher, shares_tower=False), is_resampled=is_resampled)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_every_term_takes_every_kind_of_batch(sides: Sides, case: str, kind: str) -> None:
    terms = CASES[case]
    sides.skip_if_refused(terms)
    found = sides.run(terms, "fast", sides.batch(*KINDS[kind]))
    assert all(bool(value.isfinite().all()) for value in found.values())
    if kind in SILENT:
        assert not any(bool(value.any()) for value in found.values())
    if kind == "images" and case not in UNTAUGHT:
        assert float(found["loss"]) != 0
        assert float(found["loss"]) > 0 or any(term.goes_below_zero for term in terms.values())
    if kind == "text only":
        sides.run(terms, "reference", sides.batch(*KINDS[kind]))


@pytest.mark.parametrize("case", CASES)
def test_a_batch_without_images_adds_what_its_records_add_beside_images(sides: Sides, case: str) -> None:
    """The same records in one micro-batch and in two, one of them of text alone."""
    terms = {name: term for name, term in CASES[case].items() if not term.compares_rows}
    if not terms:
        pytest.skip("its rows are compared with those of their micro-batch, as it says of itself")
    sides.skip_if_refused(terms)
    rows = [{"images": 2}, {}, {"images": 0}, {"images": 0, "answer": 3}]
    together = sides.run(terms, "fast", sides.batch(*rows))
    apart = sides.run(terms, "fast", sides.batch(*rows[:2]), sides.batch(*rows[2:], first=2))
    for name, value in together.items():
        error = (apart[name] - value).norm() / value.norm().clamp_min(1e-3)
        assert float(error) < 1e-4, f"{name}: {float(error)}"
