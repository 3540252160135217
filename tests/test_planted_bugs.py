"""Every hazard of docs/reliability.md, and every fault from the field, has a bug that its named test catches.

See planted_bugs.py and planted_field_bugs.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import planted_bugs
import pytest
from planted_bugs import BUGS, Bug, Ended, try_all
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


LEAVES_A_PROCESS = """
import subprocess, sys, time
from llava_kd.few import few

def test_few():
    if few() != 2:
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    assert few() == 2

def test_soon():
    time.sleep(600 if few() == 4 else 0)
"""


def test_a_bug_that_leaves_a_process_or_does_not_end_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {
        "llava_kd/__init__.py": "",
        "llava_kd/few.py": "def few():\n    return 2\n",
        "tests/test_few.py": LEAVES_A_PROCESS,
        "pyproject.toml": "",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(planted_bugs, "ROOT", tmp_path)
    log, orphan = tmp_path / "log", Bug(0, "few.py", "return 2", "return 3", "test_few.py::test_few")
    assert planted_bugs.ends([orphan.test], None, log) == Ended(status=0)
    assert planted_bugs.ends([orphan.test], orphan, log) == Ended(status=1, orphans=1)
    monkeypatch.setattr(planted_bugs, "SECONDS_A_TEST", 5.0)
    late = Bug(0, "few.py", "return 2", "return 4", "test_few.py::test_soon")
    assert planted_bugs.ends([late.test], late, log).status == 2


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_fault_from_the_field_is_caught(capfd: pytest.CaptureFixture[str]) -> None:
    """An hour on two cores: each in a copy, after a run of all their tests without a bug."""
    assert try_all(FIELD_BUGS) == 0, capfd.readouterr().out


@pytest.mark.slow
def test_every_bug_is_caught(capfd: pytest.CaptureFixture[str]) -> None:
    assert planted_bugs.main([]) == 0, capfd.readouterr().out
