"""The scripts, wherever they are called from, and whatever environment they find."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bin_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    command(folder / "python", 'echo "$(basename "$0") $*"')
    command(folder / "nvidia-smi", "exit 127")
    return folder


def command(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def run(script: str, bin_dir: Path, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("NPROC", "RUN", "VENV")}
    return subprocess.run(
        ["bash", script, "x.yaml"],
        env=clean | {"PATH": f"{bin_dir}:{os.environ['PATH']}", **more},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_python_that_sees_the_package_only_from_its_folder_is_not_taken(
    bin_dir: Path, tmp_path: Path
) -> None:
    command(bin_dir / "python", f'exec "{sys.executable}" -S "$@"')  # as a conda's, without our packages
    for name in ("python", "llava-kd"):
        command(tmp_path / "venv" / "bin" / name, 'echo "of the venv"')
    done = run("scripts/train.sh", bin_dir, ROOT, VENV=str(tmp_path / "venv"))
    assert done.stdout == "of the venv\n", done.stderr


@pytest.mark.parametrize("script", ["train.sh", "quickstart.sh"])
def test_an_environment_whose_python_is_gone_is_named(bin_dir: Path, tmp_path: Path, script: str) -> None:
    command(bin_dir / "python", "exit 1")
    command(tmp_path / "venv" / "bin" / "llava-kd", "exit 1")
    (tmp_path / "venv" / "bin" / "python").symlink_to("/nowhere/python")
    places = {"VENV": str(tmp_path / "venv"), "RUN": str(tmp_path / "r")}
    done = run(str(ROOT / "scripts" / script), bin_dir, tmp_path, **places)
    assert done.returncode in (1, 2)
    lines = done.stderr.splitlines()
    assert lines[0].startswith(f"the environment {tmp_path}/venv must have a Python that starts; ")
    assert len(lines) == (1 if script == "train.sh" else 2)  # the quickstart adds what it was doing


def test_a_list_of_folders_for_cd_does_not_mislead(bin_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    done = run("scripts/stage1_dpt.sh", bin_dir, ROOT, CDPATH=f"{tmp_path}:.", NPROC="1")
    assert done.stdout == f"python -m llava_kd.cli train {ROOT}/scripts/stage1_dpt.yaml x.yaml\n", done.stderr


def test_benchmarks_are_scored_on_a_machine_without_gpus(bin_dir: Path, tmp_path: Path) -> None:
    words = {"MODEL": "m", "DATA": "d", "OUT": "o"}
    done = run(str(ROOT / "eval" / "run.sh"), bin_dir, tmp_path, **words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("python -m llava_kd.cli eval --model m ")
    done = run(str(ROOT / "eval" / "run.sh"), bin_dir, tmp_path, **words, NPROC="two")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "NPROC must be a whole number from 0 to 99999; got 'two'\n"


@pytest.mark.parametrize("script", ["scripts/quickstart.sh", "examples/emoji/run.sh"])
def test_a_run_is_named_from_where_its_command_is_given(bin_dir: Path, tmp_path: Path, script: str) -> None:
    (tmp_path / "a file").touch()
    settings = {"SETUP": "no", "PYTHON": "python", "NPROC": "1"}
    done = run(str(ROOT / script), bin_dir, tmp_path, RUN="a file", **settings)
    assert "a file (RUN names another)" in done.stderr
    assert "Traceback" not in done.stderr
    command(bin_dir / "python", "exit 3")
    done = run(str(ROOT / script), bin_dir, tmp_path, RUN="my run/", **settings)
    assert done.returncode == 3, done.stderr
    assert (tmp_path / "my run").is_dir()
    assert not (ROOT / "my run").exists()


@pytest.mark.parametrize(
    ("script", "name"),
    [("scripts/quickstart.sh", "QUICKSTART_SEEDS"), ("examples/emoji/run.sh", "EMOJI_MINUTES")],
)
def test_a_number_that_is_none_is_refused_at_once(
    bin_dir: Path, tmp_path: Path, script: str, name: str
) -> None:
    done = run(str(ROOT / script), bin_dir, tmp_path, RUN=str(tmp_path / "r"), SETUP="no", **{name: "abc"})
    assert done.returncode == 2
    assert done.stderr == f"{name} must be a whole number from 1 to 99999; got 'abc'\n"
    assert not (tmp_path / "r").exists()


RANK = """
import os, signal, sys, time
if os.environ["RANK"] == "1":
    if sys.argv[1] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit("what is wrong" if sys.argv[1] == "say" else 0)
"""


@pytest.mark.parametrize(
    ("word", "status", "said"),
    [
        ("say", 1, ["what is wrong", "rank 1 ended with status 1: see its message above"]),
        ("kill", 137, ["rank 1 was ended by SIGKILL: often the machine has no memory left"]),
        ("pass", 0, []),
    ],
)
def test_a_launch_whose_rank_fails_ends_in_one_line(
    tmp_path: Path, word: str, status: int, said: list[str]
) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    words = ["--standalone", "--nproc-per-node", "2", str(tmp_path / "rank.py"), word]
    done = subprocess.run(
        [sys.executable, "-m", "llava_kd.assembly.runs.torchrun", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.splitlines()) == (status, said)
