"""The quickstart and the making of its teacher run from end to end, at reduced length."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlavaForConditionalGeneration

ROOT = Path(__file__).parents[1]
ARMS = ("sft", "kd")
STAGES = ("stage1", "stage2", "stage3")
SHORTER = {"QUICKSTART_STEPS": "2", "QUICKSTART_SCENES": "40", "QUICKSTART_QUESTIONS": "12"}


def run_unchecked(name: str, path: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / name)],
        env=os.environ | {"SETUP": "no", "PATH": path} | settings,
        capture_output=True,
        text=True,
        check=False,
    )


def run_script(name: str, path: str, **settings: str) -> subprocess.CompletedProcess[str]:
    done = run_unchecked(name, path, **settings)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs") / "quickstart"


@pytest.fixture(scope="module", autouse=True)
def ended(quickstart: Path, quick_path: str) -> subprocess.CompletedProcess[str]:
    return run_script("quickstart.sh", quick_path, RUN=str(quickstart), **SHORTER)


def test_results_hold_every_model_and_seed(quickstart: Path) -> None:
    results = json.loads((quickstart / "results.json").read_text())
    assert {"teacher", "sft", "kd", "seeds", "seconds"} <= set(results)
    for model in ("teacher", *ARMS):
        assert 0 <= results[model]["accuracy"] <= 1
        assert set(results[model]["by_type"]) == {"colour", "shape", "count", "exist", "position", "compare"}
    assert [seed["seed"] for seed in results["seeds"]] == [0]
    assert set(results["seconds"]) == {"install", "train", "eval"}


def test_the_report_needs_no_other_file(quickstart: Path) -> None:
    html = (quickstart / "report.html").read_text()
    assert "data:image/" in html
    assert "http://" not in html.replace("http://www.w3.org/", "")
    assert "<script src" not in html


def test_both_arms_start_alike_and_take_the_same_steps(quickstart: Path) -> None:
    settings = {arm: [quickstart / "seed0" / arm / s / "config.yaml" for s in STAGES] for arm in ARMS}
    for undistilled, distilled in zip(settings["sft"], settings["kd"], strict=True):
        arms = [path.read_text().splitlines() for path in (undistilled, distilled)]
        for key in ("seed:", "max_steps:", "global_batch_size:", "  lr:", "  path:"):
            kept = [[line for line in arm if line.startswith(key)] for arm in arms]
            assert kept[0] == kept[1] != []


@pytest.mark.parametrize("arm", ARMS)
def test_every_stage_ends_in_a_stock_student(quickstart: Path, arm: str) -> None:
    for stage in STAGES:
        LlavaForConditionalGeneration.from_pretrained(quickstart / "seed0" / arm / stage / "model")


def test_only_the_distilled_arm_has_distillation_terms(quickstart: Path) -> None:
    terms = {"response_kl", "visual_kl", "relation"}
    for stage, distilled in (("stage1", {"visual_kl", "relation"}), ("stage3", terms)):
        for arm, expected in (("sft", set()), ("kd", distilled)):
            lines = (quickstart / "seed0" / arm / stage / "metrics.jsonl").read_text().splitlines()
            assert terms & set(json.loads(lines[-1])) == expected


@pytest.mark.slow
def test_the_teacher_is_made_by_its_script(tmp_path: Path, quick_path: str) -> None:
    shorter = {"TEACHER_STEPS": "2", "TEACHER_SCENES": "40", "TEACHER_QUESTIONS": "12"}
    places = {"RUN": str(tmp_path / "run"), "OUT": str(tmp_path / "out")}
    run_script("quickstart/make_teacher.sh", quick_path, **places, **shorter)
    for run, made in (("last", "out"), ("captions", "out_captions")):
        LlavaForConditionalGeneration.from_pretrained(tmp_path / made)
        assert json.loads((tmp_path / "run" / run / "validation" / "summary.json").read_text())["count"] == 12


def run_times(run: Path, *words: str) -> None:
    script = ROOT / "scripts" / "quickstart" / "times.py"
    subprocess.run([sys.executable, str(script), str(run), *words], check=True)


def test_seconds_add_up_over_calls_also_over_one_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / "seconds.json").write_text('{"install": 100.0, "train": 50.0, "eval": 0.0}')
    run_times(tmp_path, "first", "install")
    run_times(tmp_path, "next", "train")
    # Killed: it trained from 1000 to 1030 by the clock, when it last wrote a file; nobody stopped it.
    (tmp_path / ".phase.json").write_text('["train", 1000.0]')
    written = tmp_path / "metrics.jsonl"
    written.touch()
    for path in tmp_path.iterdir():
        os.utime(path, (1000.0, 1000.0))
    os.utime(written, (1030.0, 1030.0))
    run_times(tmp_path, "first", "install")
    run_times(tmp_path, "stop")
    seconds = json.loads((tmp_path / "seconds.json").read_text())
    assert seconds["train"] == pytest.approx(80, abs=2)
    assert 100 <= seconds["install"] < 103
    assert not (tmp_path / ".phase.json").exists()


def test_the_last_lines_are_the_table(quickstart: Path, ended: subprocess.CompletedProcess[str]) -> None:
    results = json.loads((quickstart / "results.json").read_text())
    *_, row, interval, seconds, last = ended.stdout.splitlines()
    assert last == f"open {quickstart / 'report.html'}"
    assert row.split()[:2] == ["seed", "0"]
    shown = [f"{100 * results[name]['accuracy']:.1f}" for name in ("teacher", "sft", "kd")]
    assert [word for word in row.split() if word != "%"][2:5] == shown
    assert interval.startswith("gain:")
    assert seconds.startswith("seconds: install")


def test_what_failed_and_what_to_run_next_is_the_last_line(tmp_path: Path, quick_path: str) -> None:
    blocked = tmp_path / "run"
    blocked.mkdir()
    (blocked / "data").write_text("a file where the data should be")
    done = run_unchecked("quickstart.sh", quick_path, RUN=str(blocked), **SHORTER)
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"quickstart.sh ended with status {done.returncode} while drawing the shapes data")
    assert "run the same command again to continue" in last
