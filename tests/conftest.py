"""Small data and models that several tests share; made once a session."""

from __future__ import annotations

import os
import signal
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tiny_llava import make_tiny_llava
from tiny_runs import write_stage

from llava_kd.data.shapes.writing import write_shapes

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what it puts into the background so, and children inherit it: bash cannot trap it then.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shapes_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(directory, num_train=24, num_validation=2, num_test=6, seed=3, progress=False)
    return directory


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("teacher") / "model", hidden=48, vocab_size=280)


@pytest.fixture(scope="session")
def student_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Narrower than the teacher, tied head, fewer padded rows; the very same tower."""
    return make_tiny_llava(tmp_path_factory.mktemp("student") / "model", hidden=32, tied=True)


@pytest.fixture
def stage(tmp_path: Path, shapes_dir: Path, student_dir: Path, teacher_dir: Path):
    """Writes the YAML of a small stage and returns its path: `stage("name", **changes)`."""

    def write(name: str, **changes: object) -> Path:
        return write_stage(
            tmp_path / name, data=shapes_dir, student=student_dir, teacher=teacher_dir, **changes
        )

    return write
