"""`llava-kd watch`: what is drawn is what the files say, in any state they are in."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava_kd.assembly.watching.drawing import BARS, PLAIN_BARS, draw, sparkline
from llava_kd.assembly.watching.reading import look
from llava_kd.cli import main

NOW = 1_000_000.0


def line(step: int, **more: float) -> str:
    return json.dumps(
        {
            "step": step,
            "num_steps": 100,
            "loss": 10.0 / step,
            "cross_entropy": 4.0 / step,
            "visual_kl": 6.0 / step,
            "samples_per_s": 12.0,
            "data_wait_share": 0.25,
            "peak_memory_gb": 1.5,
            "epoch": step / 50,
            "time": NOW - 100 + step,
            "seconds_left": 100.0 - step,
            **more,
        }
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """40 of 100 steps, a line every 10, seconds apart."""
    folder = tmp_path / "runs" / "stage3"
    (folder / "logs").mkdir(parents=True)
    (folder / "config.yaml").write_text("")
    terms = {"gradient/cross_entropy": 1.0, "gradient/visual_kl": 1.0}
    lines = [line(1, **terms), *(line(step) for step in (10, 20, 30, 40))]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "logs/rank00000.log").write_text("2026-01-01 00:00:00 rank 0 info: resuming from step 0\n")
    return folder


def test_a_running_stage(run: Path) -> None:
    shown = draw(look(run, NOW - 60), 80).splitlines()
    assert shown[0] == "runs/stage3: running"
    assert shown[1] == "step 40 of 100 (40%), epoch 0.80, 1.0 min left"
    names = [row.split()[0] for row in shown[2:5]]
    assert names == ["loss", "cross_entropy", "visual_kl"]
    assert shown[2].endswith(f"{BARS[-1]}{BARS[0] * 4} 10 > 0.25")
    assert shown[5] == "12 samples/s, data wait 25%, peak 1.5 GB"
    assert shown[6] == "resuming from step 0"


def test_time_left_runs_down_between_two_lines(run: Path) -> None:
    left = [look(run, NOW - 60 + later).seconds_left for later in (0, 20, 500)]
    assert left == [60.0, 40.0, 0.0]


def test_a_run_that_fell_silent_is_said_so(run: Path) -> None:
    assert look(run, NOW - 60 + 59).state == "running"
    assert look(run, NOW - 60 + 7200).state == "no new metrics for 2.0 h"
    (run / "run.json").write_text("{}")
    assert look(run, NOW + 7200).state == "complete"
    assert look(run, NOW + 7200).seconds_left is None


@pytest.mark.parametrize("torn", ['{"step": 50, "lo', '{"step": 50', "\x00\x00", "[1]", '{"loss": 1}', '"x"'])
def test_a_torn_line_is_passed_over(run: Path, torn: str) -> None:
    before = draw(look(run, NOW), 80)
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write(torn)
    assert draw(look(run, NOW), 80) == before


def test_steps_done_again_after_a_resume_count_once(run: Path) -> None:
    before = draw(look(run, NOW), 80)
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write(line(30) + "\n" + line(40) + "\n")
    assert draw(look(run, NOW), 80) == before


@pytest.mark.parametrize("columns", [1, 40, 41, 57, 80, 300])
def test_no_line_is_wider_than_the_terminal(run: Path, columns: int) -> None:
    with (run / "metrics.jsonl").open("a") as stream:
        many = {f"loss/{'long' * 20}{n}": float(n) for n in range(3)}
        stream.writelines(f"{line(50 + n, **many)}\n" for n in range(200))
    assert max(map(len, draw(look(run, NOW), columns).splitlines())) <= max(40, columns)


def test_what_is_not_finite_is_no_figure(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write(line(50, loss=math.nan) + "\n")
    assert look(run, NOW).curve("loss")[-1] == 0.25


@pytest.mark.parametrize(
    "missing", [["metrics.jsonl"], ["logs/rank00000.log"], ["metrics.jsonl", "logs/rank00000.log"]]
)
def test_a_half_written_run_is_drawn(run: Path, missing: list[str]) -> None:
    for name in missing:
        (run / name).unlink()
    shown = draw(look(run, NOW), 80)
    assert shown.startswith("runs/stage3: ")
    if "metrics.jsonl" in missing:
        assert "starting: no metrics yet" in shown


def test_of_several_runs_the_one_that_wrote_last(run: Path) -> None:
    other = run.parent / "stage2"
    other.mkdir()
    (other / "config.yaml").write_text("")
    (other / "metrics.jsonl").write_text(line(7))
    (run / "checkpoints/step-1").mkdir(parents=True)
    (run / "checkpoints/step-1/config.yaml").write_text("")  # a checkpoint is no run
    for folder, when in ((run, 1000.0), (other, 2000.0)):
        for name in ("config.yaml", "metrics.jsonl"):
            os.utime(folder / name, (when, when))
    assert look(run.parent, NOW).directory == other
    os.utime(run / "metrics.jsonl", (3000.0, 3000.0))
    assert look(run.parent, NOW).directory == run


def test_a_curve_keeps_its_ends_and_its_order() -> None:
    rising = sparkline([float(n) for n in range(1000)], 8)
    assert rising == BARS
    assert sparkline([float(-n) for n in range(1000)], 8) == BARS[::-1]
    assert sparkline([3.0] * 5, 8) == BARS[0] * 5
    assert sparkline([], 8) == ""
    assert len(PLAIN_BARS) == len(BARS)
    assert PLAIN_BARS.isascii()


def test_the_command_needs_no_torch_no_terminal_and_no_unicode(run: Path) -> None:
    probe = (
        "import sys; from llava_kd.cli import main; status = main(sys.argv[1:]);"
        "assert not {'torch', 'transformers'} & set(sys.modules); sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe, "watch", str(run)],
        env={**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "40"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.isascii()
    assert "\x1b" not in done.stdout
    assert done.stdout.startswith("runs/stage3: ")
    assert done.stderr == ""


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for directory, words in ((tmp_path / "none", "no run"), (tmp_path, "contains no run (no config.yaml)")):
        assert main(["watch", str(directory)]) == 2
        assert words in capsys.readouterr().err
