"""A power cut at any moment of any durable write: what was promised stays, and the same command goes on."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
from disk_scenarios import SCENARIOS, Scenario
from power_cut import Disk, Moment, Tree, lay_out, quick_folder

from llava_kd.assembly.runs.provenance import checked_parent, file_hashes
from llava_kd.cli import main
from llava_kd.durable import make_folder, write_text
from llava_kd.training.checkpoint import Checkpoints, Saved


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


def test_a_small_file_is_old_or_new_and_new_once_promised(folder: Path) -> None:
    root = folder / "root"
    root.mkdir()
    disk = Disk(root)
    path = Path("a", "b", "run.json")
    with disk.watching():
        for text in ("old" * 50, "new" * 50):
            make_folder((root / path).parent)
            write_text(root / path, text)
            disk.mark(text)
    for moment, tree in disk.trees():
        found = tree.get(str(path))
        allowed = {None, "old" * 50, "new" * 50}
        if moment.marks:
            allowed = {moment.marks[-1], "new" * 50}
        assert (None if found is None else found.decode()) in allowed, (moment.after, moment.marks)


def cut_a_run(config: Path, root: Path, *, forgets: str = "") -> tuple[Disk, Path, dict[str, str]]:
    """A stage of three updates, each with a checkpoint, all of it watched."""
    output = root / "out" / "run"
    disk = Disk(root, forgets)
    save, identity = Checkpoints.save, {}

    def promised(checkpoints: Checkpoints, saved: Saved) -> Path:
        path = save(checkpoints, saved)
        identity.update(checkpoints.identity)
        disk.mark(f"saved {saved.step}")
        return path

    with mock.patch.object(Checkpoints, "save", promised), disk.watching():
        assert main(["train", str(config), f"--output_dir={output}"]) == 0
        disk.mark("finished")
    return disk, output, identity


def run_holds(output: Path, marks: tuple[str, ...], identity: dict[str, str]) -> None:
    saved, _ = Checkpoints(output / "checkpoints", keep=1, identity=identity).load_newest()
    step = 0 if saved is None else saved.step
    assert step >= max((int(mark.split()[1]) for mark in marks if mark != "finished"), default=0)
    if step:
        lines = (output / "metrics.jsonl").read_bytes().splitlines()[:step]
        assert [json.loads(line)["step"] for line in lines] == list(range(1, step + 1))
    if (output / "run.json").exists() or "finished" in marks:
        assert checked_parent(str(output / "model")) is not None


@pytest.fixture
def every_step(stage: Callable[..., Path]) -> Path:
    return stage("run", checkpoint={"every": 1, "keep": 1})


def every_state_holds(
    states: list[tuple[Moment, Tree]],
    folder: Path,
    identity: dict[str, str],
    go_on: Callable[[int, Path], None],
) -> None:
    for number, (moment, tree) in enumerate(states):
        found = lay_out(tree, folder / "found")
        try:
            run_holds(found / "out" / "run", moment.marks, identity)
            go_on(number, found / "out" / "run")
        except Exception as error:
            error.add_note(f"after {moment.after}, promised {moment.marks}: {sorted(tree)}")
            raise
        shutil.rmtree(found)


def test_a_run_is_whole_after_a_power_cut_at_any_moment(every_step: Path, folder: Path) -> None:
    """A model that says that it is finished is the one that was trained; some cuts are gone on from."""
    root = folder / "root"
    root.mkdir()
    disk, output, identity = cut_a_run(every_step, root)
    whole = file_hashes(output / "model")
    states = list(disk.trees())
    print(f"a run: {disk.calls} calls, {len(states)} states")
    again = {len(states) * share // 4 for share in (1, 2, 3)}

    def go_on(number: int, output: Path) -> None:
        if number in again:
            assert main(["train", str(every_step), f"--output_dir={output}"]) == 0
            assert file_hashes(output / "model") == whole

    with mock.patch("os.fsync"):
        every_state_holds(states, folder, identity, go_on)


@pytest.mark.parametrize("sync", ["file", "folder"])
def test_a_run_without_those_syncs_is_not(every_step: Path, folder: Path, sync: str) -> None:
    root = folder / "root"
    root.mkdir()
    disk, _, identity = cut_a_run(every_step, root, forgets=sync)
    with pytest.raises((AssertionError, OSError, ValueError)):
        every_state_holds(list(disk.trees()), folder, identity, lambda number, output: None)
