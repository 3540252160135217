"""A log a rank: every line with its rank, what libraries say in it and not on the terminal, errors last."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from llava_kd.assembly.runs.logs import VERBOSE, log_file, logged, speaker
from llava_kd.cli import main
from llava_kd.parallel.world import World

LINE = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d rank (\d+) (info|warning|error)( [\w.]+)?: (.*)$")


def world(rank: int = 0) -> World:
    return World(rank=rank, size=4, device=torch.device("cpu"))


def read(path: Path) -> list[tuple[str, str, str]]:
    """Rank, level and text of every line; a line without them fails."""
    found = [LINE.match(line) for line in path.read_text().splitlines()]
    assert all(found), path.read_text()
    return [(m[1], m[2], m[4]) for m in found if m]


def chatter() -> None:
    logging.getLogger("some.library").warning("noise of a library")
    warnings.warn("noise of a warning", stacklevel=1)
    transformers.logging.get_logger("transformers.models").warning("noise of transformers")


def test_what_libraries_say_is_in_the_file_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VERBOSE, raising=False)
    with logged(tmp_path, world()):
        chatter()
        speaker(world())("first\nsecond")
        logging.getLogger("llava_kd.data").warning("a warning of ours")
    out, err = capfd.readouterr()
    assert (out, err) == ("", "first\nsecond\na warning of ours\n")
    lines = read(log_file(tmp_path, 0))
    assert {rank for rank, _, _ in lines} == {"0"}
    texts = [text for _, _, text in lines]
    for noise in ("noise of a library", "noise of transformers", "first", "second", "a warning of ours"):
        assert noise in texts
    assert any("noise of a warning" in text for text in texts)


def test_a_library_that_writes_to_stdout_by_itself_is_kept_from_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As DeepSpeed does, whose logger is made in the middle of a run by whatever imports it."""
    monkeypatch.delenv(VERBOSE, raising=False)
    logger = logging.getLogger("DeepSpeed")
    handler = logging.StreamHandler(sys.stdout)
    with logged(tmp_path, world()):
        monkeypatch.setattr(logger, "propagate", False)
        logger.addHandler(handler)
        logger.warning("which accelerator it found")
    assert capfd.readouterr() == ("", "")
    assert [text for _, _, text in read(log_file(tmp_path, 0))] == ["which accelerator it found"]
    logger.warning("afterwards")
    logger.removeHandler(handler)
    assert "afterwards" in capfd.readouterr().out


def test_verbose_shows_it_too(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VERBOSE, "1")
    with logged(tmp_path, world()):
        chatter()
    err = capfd.readouterr().err
    assert all(f"noise of {what}" in err for what in ("a library", "a warning", "transformers"))


def test_every_rank_has_its_own_and_only_the_first_speaks(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VERBOSE, raising=False)
    with logged(tmp_path, world(3)):
        speaker(world(3))("said on rank 3")
    assert capfd.readouterr().err == ""
    assert read(log_file(tmp_path, 3)) == [("3", "info", "said on rank 3")]


@pytest.mark.parametrize(
    "error", [ValueError("one\n  two"), RuntimeError("a bug"), KeyboardInterrupt()], ids=repr
)
def test_what_ends_a_run_is_its_last_line(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), logged(tmp_path, world(1)):
        raise error
    lines = read(log_file(tmp_path, 1))
    assert all(level == "error" for _, level, _ in lines)
    last = lines[-1][2]
    assert last == "  two" if isinstance(error, ValueError) else type(error).__name__ in last


def test_afterwards_logging_is_as_it_was(tmp_path: Path) -> None:
    root, library = logging.getLogger(), logging.getLogger("transformers")

    def state() -> tuple[object, ...]:
        handlers = (set(root.handlers), set(library.handlers))
        return *handlers, root.level, library.propagate, warnings.showwarning

    before = state()
    with logged(tmp_path, world()):
        assert state() != before
    assert state() == before


def test_a_run_keeps_its_log_and_adds_to_it_as_it_goes_on(stage: Callable[..., Path]) -> None:
    path = stage("run")
    for steps in (1, 2):
        assert main(["train", str(path), f"--max_steps={steps}", "--log.every=1"]) == 0
    output = path.parent
    (log,) = output.rglob("rank00000.log")
    texts = [text for _, _, text in read(log)]
    assert sum(text.startswith("done: the student is") for text in texts) == 2
    assert "resuming from step 1" in texts


def test_a_log_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("")
    with (
        pytest.raises(ValueError, match=r"the log .*rank00000.log cannot be written"),
        logged(tmp_path, world()),
    ):
        pass
