"""The table in docs/towers.md against the towers that the tests build."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_towers import EXPECTED, TOWERS

from llava_kd.models.towers.families import FAMILIES

TEXT = (Path(__file__).parents[1] / "docs" / "towers.md").read_text()
ROWS = [
    [cell.strip() for cell in line.split("|")[1:-1]] for line in TEXT.splitlines() if line.startswith("| ")
]
TABLE = {row[0]: row[1:] for row in ROWS if row[0] != "family"}


def test_every_family_has_its_row() -> None:
    assert list(TABLE) == list(TOWERS) == list(EXPECTED)


def test_every_row_of_the_code_is_tested_and_on_the_page() -> None:
    assert {row[3] for row in TABLE.values()} == set(FAMILIES)


@pytest.mark.parametrize("family", TOWERS)
def test_a_row_says_the_prefix_tokens_and_whether_stock_holds_it(family: str) -> None:
    tokens, _, stock, _ = TABLE[family]
    assert (stock == "yes") == TOWERS[family][1]
    prefix = int(tokens.split(" + ")[0]) if "+" in tokens else 0
    patches = EXPECTED[family][0] - prefix
    assert round(patches**0.5) ** 2 == patches
