"""A power cut at any moment of any durable write: what was promised stays, and the same command goes on."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from disk_scenarios import SCENARIOS, Scenario
from power_cut import Disk, lay_out, quick_folder


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with quick_folder(tmp_path) as place:
        yield place


def cut_everywhere(scenario: Scenario, folder: Path, *, forgets: str = "") -> tuple[Disk, int, int]:
    """Run it once, then look at every state that a cut may leave: how many there were, how many refused."""
    root = folder / "root"
    root.mkdir(parents=True)
    scenario.begin(root)
    disk = Disk(root, forgets)
    with disk.watching():
        scenario.act(root, disk.mark)
    scenario.done(root)
    states = refused = 0
    gone_on = set()
    with mock.patch("os.fsync"):  # of a disk that is looked at, nothing need be kept
        for moment, tree in disk.trees():
            states += 1
            found = lay_out(tree, folder / "found")
            try:
                scenario.holds(found, moment.marks)
                key = hash(tuple(sorted(tree.items(), key=lambda item: item[0])))
                if key not in gone_on and states % scenario.every == 0:
                    gone_on.add(key)
                    scenario.act(found, lambda promise: None)
                    scenario.done(found)
            except ValueError as error:
                if not re.search(scenario.refuses, str(error)):
                    raise AssertionError(f"after {moment.after}, promised {moment.marks}") from error
                refused += 1
            except Exception as error:
                error.add_note(f"after {moment.after}, promised {moment.marks}: {sorted(tree)}")
                raise
            shutil.rmtree(found)
    return disk, states, refused


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_power_cut_at_any_moment_loses_nothing_that_was_promised(name: str, folder: Path) -> None:
    disk, states, refused = cut_everywhere(SCENARIOS[name], folder)
    print(f"{name}: {disk.calls} calls, {states} states, {refused} refused by name")
    assert states > disk.calls / 2


FORGOTTEN = [(name, sync) for name, scenario in SCENARIOS.items() for sync in scenario.needs]


@pytest.mark.parametrize(("name", "sync"), FORGOTTEN)
def test_without_the_syncs_of_files_or_of_folders_a_cut_breaks_it(name: str, sync: str, folder: Path) -> None:
    with pytest.raises((AssertionError, OSError, ValueError)):
        cut_everywhere(SCENARIOS[name], folder, forgets=sync)
