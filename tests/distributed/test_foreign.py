"""Teachers of other families than LLaVA with their layers spread over two ranks say what they say whole."""

from __future__ import annotations

import json
from pathlib import Path

import foreign_ranks
import pytest
import ranks
from test_models_any_teacher import FAMILIES
from tiny_teachers import TEACHERS, write_teacher

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_every_family_spread_over_ranks_says_the_same(tmp_path: Path) -> None:
    names = [str(family.values[0]) for family in FAMILIES if not any(mark.args[0] for mark in family.marks)]
    for name in names:
        write_teacher(tmp_path / "teachers" / name, TEACHERS[name])
    words = [str(tmp_path / "teachers"), str(tmp_path / "found")]
    ended = ranks.Ranks(words, tmp_path / "logs", ranks=2, function=foreign_ranks.main).wait()
    assert set(ended.codes) == {0}, ended.log
    for rank in range(2):
        found = json.loads((tmp_path / f"found.{rank}").read_text())
        assert set(found) == set(names)
        for name, (difference, kind) in found.items():
            assert kind == "DTensor", name
            assert difference < 1e-5, name
