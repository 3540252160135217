"""docs/reliability.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "reliability.md").read_text()
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE)))


@pytest.mark.parametrize(("file", "name"), NAMED, ids=[name for _, name in NAMED])
def test_a_named_test_exists(file: str, name: str) -> None:
    assert re.search(rf"^def {name}\(", (TESTS / file).read_text(), re.M)


def test_every_hazard_and_every_fault_names_a_test() -> None:
    tables = [part.splitlines() for part in PAGE.split("\n\n") if part.startswith(("| # ", "| fault |"))]
    assert len(tables) == 2
    bodies = [row for table in tables for row in table[2:]]
    assert len(bodies) >= 20 + 10
    assert all("::test_" in row for row in bodies)
