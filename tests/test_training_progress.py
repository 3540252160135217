"""The line that shows how far a run is: written over on a terminal, plain elsewhere, messages above it."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch

from llava_kd.training.metrics import Metrics
from llava_kd.training.progress import Progress, clock

FIGURES = {
    "loss": 3.5,
    "samples_per_s": 42.0,
    "data_wait_share": 0.031,
    "cross_entropy": 1.25,
    "visual_kl": 2.25,
}
TERMS = ["cross_entropy", "visual_kl"]


def after(steps: int, of: int = 10, stream: io.StringIO | None = None) -> Progress:
    progress = Progress(of, "runs/stage1", stream=stream or io.StringIO())
    for _ in range(steps):
        progress.step()
    progress.timed(2.0)
    return progress


def test_elsewhere_than_on_a_terminal_each_report_is_a_line() -> None:
    stream = io.StringIO()
    progress = after(4, stream=stream)
    assert stream.getvalue() == ""
    progress.report(FIGURES, TERMS)
    parts = "runs/stage1 4/10 | 0:12 left | loss 3.5 | 42 samples/s | data wait 3%"
    assert stream.getvalue() == f"{parts} | cross_entropy 1.25 | visual_kl 2.25\n"
    progress.close()
    assert stream.getvalue().count("\n") == 1
    assert "\r" not in stream.getvalue()


@pytest.mark.parametrize("columns", range(12, 140, 7))
def test_a_narrow_terminal_drops_the_last_parts_first(columns: int) -> None:
    progress = after(4)
    progress.report(FIGURES, TERMS)
    whole, cut = progress.text(), progress.text(columns)
    assert len(cut) <= columns
    assert whole.startswith(cut)
    if columns > 16:
        assert cut in (whole, *(whole[: m.start()] for m in re.finditer(r" \| ", whole)))


def test_time_left_is_zero_at_the_end_and_follows_the_speed() -> None:
    progress = after(9)
    assert progress.seconds_left == 2.0
    progress.timed(4.0)
    assert progress.seconds_left == 3.0  # between both
    progress.step()
    assert progress.seconds_left == 0.0
    assert Progress(10, "a", stream=io.StringIO()).seconds_left is None


def test_one_term_is_not_said_twice() -> None:
    progress = after(1)
    progress.report(FIGURES, ["cross_entropy"])
    assert "cross_entropy" not in progress.text()


def test_hidden_it_writes_nothing() -> None:
    stream = io.StringIO()
    progress = Progress(10, "a", is_shown=False, stream=stream)
    progress.step()
    progress.report(FIGURES, TERMS)
    progress.close()
    assert stream.getvalue() == ""


def test_clocks() -> None:
    seconds = (0, 59.6, 130, 3600 + 62, 86400 * 3 + 3600)
    assert [clock(s) for s in seconds] == ["0:00", "1:00", "2:10", "1:01:02", "3 d 01:00"]


ON_A_TERMINAL = """
import sys
from tqdm import tqdm
from llava_kd.training.progress import Progress
progress = Progress(5, "runs/stage1")
for step in range(5):
    progress.step()
    progress.timed(1.0)
    progress.report({"loss": 1.0 + step}, [])
    tqdm.write(f"message {step}", file=sys.stderr)
progress.close()
print("llava-kd train: an error", file=sys.stderr)
"""


def written_over(row: str) -> str:
    """What stays of a row whose parts begin at its first column again."""
    shown = ""
    for part in row.split("\r"):
        shown = part + shown[len(part) :]
    return shown.rstrip()


def test_on_a_terminal_no_message_is_glued_to_the_line() -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    process = subprocess.Popen([sys.executable, "-c", ON_A_TERMINAL], stderr=theirs, stdout=theirs)
    os.close(theirs)
    written = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:
            break
        if not piece:
            break
        written += piece
    assert process.wait() == 0
    text = written.decode().replace("\r\n", "\n")
    shown = [written_over(row) for row in text.split("\n")]
    assert [row for row in shown if row.startswith("message")] == [f"message {n}" for n in range(5)]
    assert "runs/stage1 5/5 | 0:00 left | loss 5" in shown
    assert "llava-kd train: an error" in shown
    assert not [row for row in shown if "message" in row and "runs/stage1" in row]


def test_lines_of_metrics_say_when_how_far_and_how_long(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, num_steps=8, every=4, steps_per_epoch=16)
    for step in range(1, 9):
        metrics.add(step, {"loss": torch.tensor(1.0)}, {"samples": torch.tensor(2.0)}, lambda: {})
    metrics.close()
    first, last = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (first["epoch"], last["epoch"]) == (0.25, 0.5)
    assert first["num_steps"] == last["num_steps"] == 8
    assert first["seconds_left"] == pytest.approx(4 * first["seconds_per_step"])
    assert last["seconds_left"] == 0
    assert last["time"] - first["time"] == pytest.approx(4 * last["seconds_per_step"], abs=0.5)
