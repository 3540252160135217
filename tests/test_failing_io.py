"""Every call to the system fails in turn: nothing good is lost, the file is named, the next run goes on."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from disk_scenarios import SCENARIOS
from failing_io import Fault
from power_cut import quick_folder

NAMES = ("checkpoints and figures", "answers and scores", "scores of records", "a teacher's cache")
NAMES = (*NAMES, "a model directory", "a run made longer", "the id of a tracker")
ERRORS = [
    ("EIO", False),
    ("ENOSPC", True),
    ("short", False),
    pytest.param("ENOSPC", False, marks=pytest.mark.slow),
    pytest.param("EINTR", False, marks=pytest.mark.slow),
]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with quick_folder(tmp_path) as place:
        yield place


@pytest.mark.parametrize(("error", "stays"), ERRORS)
@pytest.mark.parametrize("name", NAMES)
def test_any_call_may_fail_and_nothing_good_is_lost(name: str, error: str, stays: bool, folder: Path) -> None:
    scenario = SCENARIOS[name]
    begun = folder / "begun"
    begun.mkdir()
    scenario.begin(begun)
    at = stopped = 0
    while True:
        at += 1
        root = Path(shutil.copytree(begun, folder / "root"))
        marks: list[str] = []
        fault = Fault(at, error, stays)
        said = ""
        with mock.patch("os.fsync"), fault.happening():
            try:
                scenario.act(root, marks.append)
            except (OSError, ValueError) as caught:
                said = str(caught)
        if fault.count < at:
            break
        where = f"call {at} ({fault.happened}), {error}, promised {marks}: {said}"
        with mock.patch("os.fsync"):
            scenario.holds(root, marks)
            if said:
                stopped += 1
                assert fault.happened, where
                assert error != "short", where
                assert re.search(re.escape(str(root)), said), where
            else:
                scenario.done(root)
            scenario.act(root, lambda promise: None)
            scenario.done(root)
        shutil.rmtree(root)
    print(f"{name}, {error}{', stays' if stays else ''}: {at - 1} calls, {stopped} stopped it by name")
    assert at > 3
