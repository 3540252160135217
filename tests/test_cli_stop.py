"""Stops and errors outside the loop: one line, a status that says what to do, and nothing left behind."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from llava_kd.assembly import train as build_train
from llava_kd.cli import main
from llava_kd.parallel.world import World


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 0), (signal.SIGINT, 130)]
)
def test_a_signal_before_the_first_step_ends_the_run_in_one_line(
    stage, capfd, monkeypatch, number: signal.Signals, status: int
) -> None:
    config = stage("run", distilled=False, max_steps=1)
    with monkeypatch.context() as patched:
        patched.setattr(build_train, "student_in", lambda *_, **__: os.kill(os.getpid(), number))
        before = signal.getsignal(number)
        with pytest.raises(SystemExit) as ended:
            main(["train", str(config)])
    assert ended.value.code == status
    assert signal.getsignal(number) == before
    text = capfd.readouterr().err
    assert text == f"stopped by {number.name} outside of any step; run the same command again to continue\n"
    assert main(["train", str(config)]) == 0


def test_a_library_that_stumbles_over_the_stop_does_not_make_a_failure_of_it(
    stage, capfd, monkeypatch
) -> None:
    """torch's modes, interrupted between a pop and its push, raise another error on the way up."""

    def interrupted(*_: object, **__: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            raise RuntimeError("trying to pop from empty mode stack")

    config = stage("run", distilled=False, max_steps=1)
    with monkeypatch.context() as patched:
        patched.setattr(build_train, "student_in", interrupted)
        with pytest.raises(SystemExit) as ended:
            main(["train", str(config)])
    assert ended.value.code == 0
    assert (
        capfd.readouterr().err
        == "stopped by SIGTERM outside of any step; run the same command again to continue\n"
    )
    assert main(["train", str(config)]) == 0


def test_what_a_file_refuses_is_one_line(stage, capsys) -> None:
    config = stage("run", distilled=False, max_steps=1)
    assert main(["train", str(config)]) == 0
    output = config.with_suffix("")
    (output / "run.json").unlink()
    (output / "metrics.jsonl").unlink()
    (output / "metrics.jsonl").mkdir()
    capsys.readouterr()
    assert main(["train", str(config)]) == 2
    lines = capsys.readouterr().err.splitlines()
    path = output / "metrics.jsonl"
    advice = "a folder stands where a file must be; remove it or name another path"
    assert lines[-1] == f"llava-kd train: {path}: Is a directory; {advice}"
    assert not any("Traceback" in line for line in lines)


def test_what_a_file_refuses_on_one_rank_stops_the_others(tmp_path: Path) -> None:
    """`together` counts it as a failure of this rank before it goes on up."""
    told: list[float] = []

    class Told(World):
        def sum(self, values):
            told.append(float(values[0]))
            return values

    world = Told(rank=0, size=2, device=torch.device("cpu"))
    with pytest.raises(IsADirectoryError), world.together():
        tmp_path.read_text()
    assert told == [1.0]
