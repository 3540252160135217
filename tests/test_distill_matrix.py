"""Every term with every option, on micro-batches with and without images: finite, and no weight left out.

Shape legend: I images, M teacher tokens of an image, E teacher width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_batches import TinyRecord, inputs, record
from tiny_llava import make_tiny_llava
from torch import Tensor

from llava_kd.batch import Batch
from llava_kd.distill.objective import KL, CrossEntropy, Objective, Relation
from llava_kd.distill.options import Attention, DBiLD
from llava_kd.distill.student import Student
from llava_kd.distill.taught import Taught
from llava_kd.distill.teaching.from_teacher import FromTeacher
from llava_kd.distill.teaching.live import Teacher
from llava_kd.distill.teaching.switch import Switch
from llava_kd.losses import dbild, head_loss, reference, relation
from llava_kd.losses.reference import Divergence
from llava_kd.models.files.checkpoint import load_stock
from llava_kd.models.mllm import MLLM, PARTS
from llava_kd.models.projectors.width_map import width_map
from llava_kd.models.towers.visual_grid import VisualGrid, resample

COMMON = 260
SMALL, LARGE = VisualGrid(rows=4, columns=4), VisualGrid(rows=5, columns=5)
FORMS = {
    "fast": {
        "head_loss": head_loss.head_loss,
        "relation_rows": relation.relation_rows,
        "dbild_loss": dbild.dbild_loss,
    },
    "reference": {
        "head_loss": reference.head_loss,
        "relation_rows": reference.relation_rows,
        "dbild_loss": reference.dbild_loss,
    },
}
TERMS: dict[str, dict[str, object]] = {
    "cross_entropy": {"cross_entropy": CrossEntropy()},
    **{
        f"{name} {kind}": {name: KL(divergence=Divergence(kind), temperature=2.0)}
        for name in ("response_kl", "visual_kl")
        for kind in ("forward", "reverse", "jsd", "skewed_forward", "skewed_reverse")
    },
    **{
        f"relation {tap}{' centre' * centre}{' normalise' * normalise}": {
            "relation": Relation(tap=tap, centre=centre, normalise=normalise)
        }
        for tap in ("logits", "hidden", "projector")
        for centre in (False, True)
        for normalise in (False, True)
    },
    "response_dbild": {"response_dbild": DBiLD()},
    "visual_switch tower": {"visual_switch": DBiLD()},
    "visual_switch projector": {"visual_switch": DBiLD()},
    "attention": {"attention": Attention()},
    "attention with sinks": {"attention": Attention(drop_sinks=False)},
}
TERMS["all"] = {
    "cross_entropy": CrossEntropy(),
    "response_kl": KL(),
    "visual_kl": KL(divergence=Divergence("jsd")),
    "relation": Relation(),
    "response_dbild": DBiLD(),
    "visual_switch": DBiLD(),
    "attention": Attention(),
}
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

    def run(self, term: str, form: str, *batches: Batch) -> dict[str, Tensor]:
        """Gradients of the step, and its loss beside them."""
        align = partial(resample, source=SMALL, target=LARGE) if self.is_resampled else None
        objective = Objective(num_common=COMMON, align=align, **TERMS[term], **FORMS[form])  # type: ignore[arg-type]
        source = "tower" if self.student.train_tower and "projector" not in term else "projector"
        switch = self.switch(source) if objective.visual_switch is not None else None
        module = Student(self.student, objective, FromTeacher(self.teacher, switch))
        module.zero_grad()
        counts = batches[0].counts()
        for batch in batches[1:]:
            counts = counts + batch.counts()
        total = torch.zeros(())
        for batch in batches:
            taught = Taught(prediction=self.teacher(batch) if objective.needs_teacher else None)
            loss, means = module(batch, counts, taught=taught)
            assert all(bool(mean.isfinite()) for mean in means.values()), means
            loss.backward()
            total = total + loss.detach()
        found = {name: p.grad for name, p in self.student.named_parameters() if p.requires_grad}
        missed = [name for name, gradient in found.items() if gradient is None]
        assert not missed, f"no gradient reaches {missed}"
        return {"loss": total, **{name: g.clone() for name, g in found.items() if g is not None}}


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
    return Sides(student=student, teacher=Teacher(teacher, shares_tower=False), is_resampled=is_resampled)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("term", TERMS)
def test_every_term_takes_every_kind_of_batch(sides: Sides, term: str, kind: str) -> None:
    if term == "visual_switch tower" and not sides.student.train_tower:
        pytest.skip("refused by the settings: it could move nothing")
    found = sides.run(term, "fast", sides.batch(*KINDS[kind]))
    assert all(bool(value.isfinite().all()) for value in found.values())
    if kind in SILENT:
        assert not any(bool(value.any()) for value in found.values())
    if kind == "images":
        assert float(found["loss"]) > 0
    if kind == "text only":
        sides.run(term, "reference", sides.batch(*KINDS[kind]))


@pytest.mark.parametrize("term", TERMS)
def test_a_batch_without_images_adds_what_its_records_add_beside_images(sides: Sides, term: str) -> None:
    """The same records in one micro-batch and in two, one of them of text alone."""
    if term == "visual_switch tower" and not sides.student.train_tower:
        pytest.skip("refused by the settings: it could move nothing")
    rows = [{"images": 2}, {}, {"images": 0}, {"images": 0, "answer": 3}]
    together = sides.run(term, "fast", sides.batch(*rows))
    apart = sides.run(term, "fast", sides.batch(*rows[:2]), sides.batch(*rows[2:], first=2))
    for name, value in together.items():
        error = (apart[name] - value).norm() / value.norm().clamp_min(1e-3)
        assert float(error) < 1e-4, f"{name}: {float(error)}"
