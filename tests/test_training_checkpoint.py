"""Checkpoints of a run: complete or absent, the newest few, and a bad one never costs the good ones."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llava_kd import durable
from llava_kd.checksums import sealed
from llava_kd.durable import write_text
from llava_kd.training import checkpoint
from llava_kd.training.checkpoint import Checkpoints, Saved, refuse_newer_format, sweep


def saved(step: int) -> Saved:
    return Saved(step=step, state={"parameter/w": torch.full((3,), float(step))})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Complete checkpoints of steps 2 and 4."""
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    for step in (2, 4):
        checkpoints.save(saved(step))
    return tmp_path / "c"


def cut_weights(directory: Path) -> None:
    path = directory / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def no_weights(directory: Path) -> None:
    (directory / "state.safetensors").unlink()


def empty_weights(directory: Path) -> None:
    (directory / "state.safetensors").write_bytes(b"")


def cut_meta(directory: Path) -> None:
    (directory / "trainer.json").write_text('{"format": 1, "st')


def other_meta(directory: Path) -> None:
    (directory / "trainer.json").write_text('["x"]')


def meta_without_step(directory: Path) -> None:
    (directory / "trainer.json").write_text('{"format": 1}')


def rewritten(directory: Path, **changes: object) -> None:
    path = directory / "trainer.json"
    path.write_text(json.dumps(sealed({**json.loads(path.read_text()), **changes})))


def other_weights(directory: Path) -> None:
    path = directory / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")


def another_step(directory: Path) -> None:
    tree = json.loads((directory / "trainer.json").read_text())
    (directory / "trainer.json").write_text(json.dumps({**tree, "step": 5}))


def no_checksum(directory: Path) -> None:
    tree = json.loads((directory / "trainer.json").read_text())
    del tree["checksum"]
    (directory / "trainer.json").write_text(json.dumps({**tree, "chekcsum": 1}))


def step_in_words(directory: Path) -> None:
    rewritten(directory, step="4")


def figures_in_words(directory: Path) -> None:
    rewritten(directory, figures="good")


DAMAGES: dict[Callable[[Path], None], str] = {
    cut_weights: "state.safetensors has checksum",
    no_weights: "state.safetensors",
    empty_weights: "state.safetensors has checksum",
    other_weights: "as when it was written",
    cut_meta: "trainer.json is not JSON (",
    other_meta: "trainer.json has no format number",
    meta_without_step: "trainer.json has no step",
    another_step: "trainer.json has another checksum than when it was written",
    no_checksum: "trainer.json has no checksum, but ['chekcsum']",
    step_in_words: "trainer.json has no step",
    figures_in_words: "trainer.json has figures that are no table",
}


def test_what_was_saved_comes_back(root: Path) -> None:
    newest, problems = Checkpoints(root, keep=2).load_newest()
    assert newest is not None
    assert newest.step == 4
    assert torch.equal(newest.state["parameter/w"], torch.full((3,), 4.0))
    assert problems == []


def test_no_checkpoint_is_no_problem(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none", keep=1).load_newest() == (None, [])


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_newest_one_is_passed_over_with_a_line(root: Path, damage: Callable[[Path], None]) -> None:
    damage(root / "step-00000004")
    newest, problems = Checkpoints(root, keep=2).load_newest()
    assert newest is not None
    assert newest.step == 2
    assert len(problems) == 1
    assert "step-00000004 cannot be read and is skipped" in problems[0]
    assert DAMAGES[damage] in problems[0]


@pytest.mark.parametrize("step", [3, 4, 6])
def test_a_damaged_newest_one_never_outlives_the_good_ones(root: Path, step: int) -> None:
    """With keep=1 a bad checkpoint of a later step must not count as the one that is kept."""
    cut_weights(root / "step-00000004")
    checkpoints = Checkpoints(root, keep=1)
    checkpoints.save(saved(step))
    newest, problems = checkpoints.load_newest()
    assert newest is not None
    assert (newest.step, problems) == (step, [])
    assert checkpoints.steps() == [step]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    checkpoints = Checkpoints(tmp_path, keep=keep)
    for step in (9, 10, 11, 100):
        checkpoints.save(saved(step))
    assert checkpoints.steps() == [9, 10, 11, 100][-keep:]
    assert len(list(tmp_path.iterdir())) == keep


def test_dropping_older_ones_keeps_the_newest_few_the_best_and_whatever_is_newer(tmp_path: Path) -> None:
    """What is newer could not be read when a run goes on from `newest`; a save of its step replaces it."""
    many = Checkpoints(tmp_path, keep=9)
    for step, value in ((2, 0.5), (4, 0.1), (6, 0.3), (8, 0.2), (10, 0.0)):
        many.save(Saved(step=step, state=saved(step).state, figures={"loss/held_out": value}))
    Checkpoints(tmp_path, keep=1, best="loss/held_out").drop_older(8)
    assert many.steps() == [4, 8, 10]
    Checkpoints(tmp_path, keep=2).drop_older(8)
    assert many.steps() == [4, 8, 10]
    Checkpoints(tmp_path, keep=1).drop_older(8)
    assert many.steps() == [8, 10]


def test_keeping_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint\.keep must be at least 1; got 0"):
        Checkpoints(tmp_path, keep=0)


@pytest.mark.parametrize("name", ["make_folder", "write_tensors", "put_folder"])
def test_a_write_that_fails_leaves_the_good_ones_and_is_cleaned_up(
    root: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    checkpoints = Checkpoints(root, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, name, full_disk)
        with pytest.raises(ValueError, match=r"step 6 cannot be written into .*No space"):
            checkpoints.save(saved(6))
    assert checkpoints.steps() == [2, 4]
    newest, problems = checkpoints.load_newest()
    assert newest is not None
    assert (newest.step, problems) == (4, [])
    assert not list(root.glob(".step-*"))
    checkpoints.save(saved(8))
    assert sorted(path.name for path in root.iterdir()) == ["step-00000008"]


def test_a_half_written_directory_is_never_read(root: Path) -> None:
    partial = root / ".step-00000009.partial"
    partial.mkdir()
    (partial / "trainer.json").write_text('{"format": 1, "step": 9}')
    (root / "step-00000010").mkdir()  # without trainer.json, which is written last
    newest, _ = Checkpoints(root, keep=2).load_newest()
    assert newest is not None
    assert newest.step == 4


def test_a_checkpoint_of_a_newer_version_is_refused_and_not_passed_over(root: Path) -> None:
    (root / "step-00000004" / "trainer.json").write_text(json.dumps({"format": 99, "step": 4}))
    with pytest.raises(ValueError, match=r"step-00000004 has format 99, this version reads up to 1; upgrade"):
        Checkpoints(root, keep=2).load_newest()


def test_a_newer_version_is_seen_behind_an_unreadable_one(root: Path) -> None:
    cut_meta(root / "step-00000002")
    rewritten(root / "step-00000004", format=99)
    with pytest.raises(ValueError, match="step-00000004 has format 99"):
        refuse_newer_format(root)


def test_figures_come_back_and_an_old_checkpoint_has_none(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1, best="loss/x")
    checkpoints.save(Saved(step=3, state=saved(3).state, figures={"loss/x": 0.25}))
    newest, _ = checkpoints.load_newest()
    assert newest is not None
    assert newest.figures == {"loss/x": 0.25}
    tree = json.loads((tmp_path / "step-00000003" / "trainer.json").read_text())
    del tree["figures"], tree["checksum"]
    (tmp_path / "step-00000003" / "trainer.json").write_text(json.dumps(sealed(tree)))
    newest, problems = checkpoints.load_newest()
    assert newest is not None
    assert (newest.figures, problems) == ({}, [])


def test_the_best_is_sought_behind_one_that_cannot_be_read_and_up_to_a_step(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=9, best="loss/x")
    for step, value in ((2, 0.5), (4, 0.3), (6, 0.2), (8, 0.1)):
        checkpoints.save(Saved(step=step, state=saved(step).state, figures={"loss/x": value}))
    cut_meta(tmp_path / "step-00000002")
    found = [checkpoints.best(up_to=step) for step in (2, 5, 6, None)]
    assert [None if best is None else best.step for best in found] == [None, 4, 6, 8]


@pytest.mark.parametrize(
    ("then", "now", "said"),
    [
        ({"tower": "a"}, {"tower": "b"}, "was trained with another tower: fingerprint a, now b. Restore"),
        ({}, {"peer": "b"}, "was trained without a peer, and this run is with. Restore"),
        ({"peer": "a"}, {}, "was trained with a peer, and this run is without. Restore"),
    ],
)
def test_another_identity_is_refused_in_words(tmp_path: Path, then: dict, now: dict, said: str) -> None:
    directory = Checkpoints(tmp_path, keep=1, identity=then).save(saved(1))
    with pytest.raises(ValueError, match=re.escape(f"{directory} {said}")):
        Checkpoints(tmp_path, keep=1, identity=now).load_newest()


def test_leftovers_of_both_kinds_are_swept(root: Path) -> None:
    for name in (".step-00000009.partial", ".step-00000002.retired"):
        (root / name).mkdir()
        (root / name / "state.safetensors").write_bytes(b"x")
    sweep(root)
    assert sorted(path.name for path in root.iterdir()) == ["step-00000002", "step-00000004"]


def test_extra_files_go_into_every_checkpoint(tmp_path: Path) -> None:
    directory = Checkpoints(tmp_path, keep=1, extra_files={"config.yaml": "seed: 1\n"}).save(saved(1))
    assert (directory / "config.yaml").read_text() == "seed: 1\n"
    assert {path.suffix for path in directory.iterdir()} == {".yaml", ".json", ".safetensors"}


def test_a_text_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    write_text(path, "old")

    def full_disk(_: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(durable, "sync", full_disk)
        with pytest.raises(OSError, match="No space"):
            write_text(path, "new")
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_what_a_user_puts_beside_the_checkpoints_does_not_stop_a_resume(root: Path) -> None:
    shutil.copytree(root / "step-00000004", root / "step-00000004.bak")
    (root / "step-latest").symlink_to("step-00000004")
    (root / "step-00000008").symlink_to("step-00000004")  # the name of another step
    (root / "step-00000010").write_text("a note")
    (root / "step-00000012").symlink_to("nowhere")
    checkpoints = Checkpoints(root, keep=2)
    assert checkpoints.steps() == [2, 4, 8]
    newest, problems = checkpoints.load_newest()
    assert newest is not None
    assert newest.step == 4
    assert len(problems) == 1
    assert "step-00000008 cannot be read" in problems[0]
    assert "it holds the checkpoint of step 4" in problems[0]
    for step in (6, 8, 10, 12):  # over them too
        checkpoints.save(saved(step))
    assert checkpoints.steps() == [10, 12]
    newest, problems = checkpoints.load_newest()
    assert newest is not None
    assert newest.step == 12
    assert not problems
    assert (root / "step-00000004.bak" / "state.safetensors").is_file()


def test_a_checkpoint_that_was_moved_and_linked_back_is_read_and_let_go_of_by_its_link(
    root: Path, tmp_path: Path
) -> None:
    (root / "step-00000004").rename(tmp_path / "moved")
    (root / "step-00000004").symlink_to(tmp_path / "moved")
    checkpoints = Checkpoints(root, keep=1)
    newest, _ = checkpoints.load_newest()
    assert newest is not None
    assert newest.step == 4
    checkpoints.save(saved(6))
    assert [path.name for path in root.iterdir()] == ["step-00000006"]
    assert (tmp_path / "moved" / "state.safetensors").is_file()


def test_every_flipped_bit_of_trainer_json_is_harmless_or_passed_over_by_name(root: Path) -> None:
    path = root / "step-00000004" / "trainer.json"
    whole = path.read_bytes()
    said = json.loads(whole)
    for place in range(0, 8 * len(whole), 3):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        found, problems = Checkpoints(root, keep=2).load_newest()
        assert found is not None
        if found.step == 4:
            assert json.loads(flipped) == said
            assert problems == []
        else:
            assert str(path.parent) in problems[0]


def test_a_checkpoint_of_a_version_without_that_checksum_is_read_and_named(root: Path) -> None:
    path = root / "step-00000004" / "trainer.json"
    meta = json.loads(path.read_text())
    del meta["checksum"]
    path.write_text(json.dumps(meta))
    found, problems = Checkpoints(root, keep=2).load_newest()
    assert found is not None
    assert found.step == 4
    assert "without a checksum of trainer.json" in problems[0]
