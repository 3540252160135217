"""Sources of a mixture that are read by a template of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from data_samples import entry, side, write_dataset
from tiny_llava import make_tiny_llava

from llava_kd.assembly.parts.data import side as side_of_parts
from llava_kd.batch import IGNORE_INDEX
from llava_kd.config import DataConfig
from llava_kd.config.data import SourceConfig
from llava_kd.data.batches.lengths import record_sizes
from llava_kd.data.sources.llava_json import LlavaJson
from llava_kd.data.sources.mixture import Mixture
from llava_kd.data.text.template_table import TEMPLATES
from llava_kd.models.files.checkpoint import load_stock

OWN = {"plain": TEMPLATES["plain"]}


def two(root: Path, templates: Sequence[str | None] = (None, "plain")) -> Mixture:
    sources = []
    for name in ("questions", "captions"):
        (root / name).mkdir(exist_ok=True)
        path = write_dataset(root / name, [entry(i) | {"id": f"{name}{i}"} for i in range(5)])
        sources.append(LlavaJson(path, root / name))
    return Mixture(sources, [1.0, 1.0], templates=templates)


def test_each_record_is_read_as_by_a_run_of_its_source_alone(tmp_path: Path) -> None:
    mixture = two(tmp_path)
    mixed = replace(side(), source_templates=OWN).encoder()
    alone = {"questions": side().encoder(), "captions": side(template="plain").encoder()}
    texts = set()
    for i in range(len(mixture)):
        record = mixture.record(i)
        expected = alone[record.id[:-1]](replace(record, template=None))
        found = mixed(record)
        assert torch.equal(found.ids, expected.ids)
        assert torch.equal(found.labels, expected.labels)
        texts.add((found.labels != IGNORE_INDEX).sum().item() / len(found.ids) > 0.5)
    assert texts == {True, False}, "both templates were used"


def test_planned_places_are_those_that_the_records_take(tmp_path: Path) -> None:
    mixture, mixed = two(tmp_path), replace(side(), source_templates=OWN)
    sizes = record_sizes(mixture, (mixed,))
    encode = mixed.encoder()
    assert sizes.tokens.tolist() == [len(encode(mixture.record(i)).ids) for i in range(len(mixture))]


def test_another_template_is_another_source_and_another_side(tmp_path: Path) -> None:
    prints = {two(tmp_path, t).fingerprint for t in ((None, "plain"), ("plain", None), (None, None), ())}
    assert len(prints) == 3, "no template at all is what it was before there were any"
    plain, own = side(), replace(side(), source_templates=OWN)
    assert plain.text_fingerprint != own.text_fingerprint
    assert not plain.reads_as(own)


def test_an_unknown_template_of_a_source_is_refused_by_name(tmp_path: Path) -> None:
    parts = load_stock(str(make_tiny_llava(tmp_path / "model")))
    part = SourceConfig(path="x.json", template="plane")
    with pytest.raises(ValueError, match=r"data.sources\[\].template.*plain.*got 'plane'"):
        side_of_parts(parts, DataConfig(sources=[part]))
