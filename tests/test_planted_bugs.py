"""Every hazard of docs/reliability.md, and every fault from the field, has a bug that its named test catches.

See planted_bugs.py and planted_field_bugs.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import planted_bugs
import pytest
from planted_bugs import BUGS, Bug, try_all
from planted_field_bugs import FIELD_BUGS

PAGE = (planted_bugs.ROOT / "docs" / "reliability.md").read_text()


def test_every_hazard_has_a_bug_for_a_test_that_its_row_names() -> None:
    rows = {int(row.split("|")[1]): row for row in PAGE.splitlines() if re.match(r"\| \d+ \|", row)}
    assert sorted(rows) == sorted({bug.hazard for bug in BUGS}) == list(range(1, 21))
    for bug in BUGS:
        assert f"`{bug.test.split('[')[0]}`" in rows[bug.hazard]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: f"{bug.hazard}-{Path(bug.file).stem}")
def test_a_bug_still_has_its_place_in_the_code(bug: Bug) -> None:
    compile(planted_bugs.planted(bug), bug.file, "exec")


@pytest.mark.parametrize("name", FIELD_BUGS)
def test_a_fault_from_the_field_still_has_its_place_and_its_test(name: str) -> None:
    bug = FIELD_BUGS[name]
    compile(planted_bugs.planted(bug), bug.file, "exec")
    file, _, test = bug.test.partition("::")
    assert f"def {test}(" in (Path(__file__).parent / file).read_text()


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_fault_from_the_field_is_caught(capfd: pytest.CaptureFixture[str]) -> None:
    """An hour on two cores: each in a copy, after a run of all their tests without a bug."""
    assert try_all(FIELD_BUGS) == 0, capfd.readouterr().out


@pytest.mark.slow
def test_every_bug_is_caught(capfd: pytest.CaptureFixture[str]) -> None:
    assert planted_bugs.main([]) == 0, capfd.readouterr().out
