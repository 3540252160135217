"""docs/your_data.md from its first command to its last, as a new user types it; docs/watching.md's fields."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from own_pictures import ROOT, write_csv, write_pictures

from llava_kd.cli import main

PAGE = (ROOT / "docs/your_data.md").read_text()
FIELDS = (ROOT / "docs/watching.md").read_text()


def commands(page: str) -> str:
    return "".join(re.findall(r"^```bash\n(.*?)^```", page, re.S | re.M))


def run_page(folder: Path, path: str, count: int) -> subprocess.CompletedProcess[str]:
    """All commands of the page in one shell, in a folder that holds the pictures, the table and `scripts`."""
    write_csv(folder / "table.csv", write_pictures(folder / "photos", count))
    (folder / "scripts").symlink_to(ROOT / "scripts")
    environment = {**os.environ, "PATH": path, "SETUP": "no", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands(PAGE)],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_page_makes_a_student_of_own_pictures(tmp_path: Path, quick_path: str) -> None:
    done = run_page(tmp_path, quick_path, 40)
    assert done.returncode == 0, done.stdout + done.stderr
    project = tmp_path / "my_project"
    runs = sorted(project.glob("runs/*/run.json"))
    assert len(runs) == 3
    assert (runs[-1].parent / "model" / "model.safetensors").is_file()
    summary = json.loads((project / "scores" / "summary.json").read_text())
    assert summary["count"] == 4  # a tenth, held out
    assert "40 optimiser steps are too few" in done.stdout  # of 32 records
    assert done.stdout.rstrip().splitlines()[-1]  # the answer of the last command


def test_the_page_has_at_most_six_commands_and_its_words_are_known() -> None:
    typed = [line for line in commands(PAGE).replace("\\\n", "").splitlines() if line.strip()]
    assert len(typed) <= 6
    for words in re.findall(r"`(--[a-z_]+)", PAGE):
        assert any(
            words in (ROOT / "llava_kd/cli" / f).read_text() for f in ("projects.py", "stages.py")
        ) or (words in ("--optim", "--global_batch_size", "--epochs")), words


def test_every_field_of_the_metrics_is_on_the_page(stage: Callable[..., Path], shapes_dir: Path) -> None:
    held = f"{{every: 2, losses: {{held: {{path: {shapes_dir / 'test.json'}, images: {shapes_dir}}}}}}}"
    path = stage("run")
    assert main(["train", str(path), "--max_steps=2", "--log.every=1", f"--evaluate={held}"]) == 0
    (metrics,) = path.parent.rglob("metrics.jsonl")
    seen = {name for line in metrics.read_text().splitlines() for name in json.loads(line)}
    cells = re.findall(r"^\| (`.*?) \|", FIELDS, re.M)
    documented = {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    terms = {name.removeprefix("gradient/") for name in seen if name.startswith("gradient/")}
    assert {"cross_entropy", "response_kl"} <= terms
    prefixes = ("gradient/", "gradient_share/", "tokens/", "loss/", "slice/")
    unknown = {name for name in seen - documented - terms if not name.startswith(prefixes)}
    assert not unknown
    rare = {"TERM", "lr/PART", "weight/TERM", "gradient/TERM", "gradient_share/TERM", "tokens/..."}
    rare |= {"loss/NAME", "slice/NAME"}
    rare |= {"student_mfu", "teacher_mfu", "peak_tflops"}  # on a GPU
    assert documented - seen <= rare  # nothing is promised that does not come


@pytest.mark.slow
def test_two_hundred_pictures_by_the_page(tmp_path: Path, quick_path: str) -> None:
    done = run_page(tmp_path, quick_path, 200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "optimiser steps are too few" not in done.stdout
