"""Small data and models that several tests share; made once a session."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from quick_commands import QuickCommands
from tiny_llava import make_tiny_llava
from tiny_runs import write_stage

from llava_kd.data.shapes.writing import write_shapes
from llava_kd.models.files.checkpoint import Parts, load_stock, save_stock

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what it puts into the background so, and children inherit it: bash cannot trap it then.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Files of half a minute and more, the longest first: begun last, one would run alone at the end.
LONG = (
    "test_group_signals.py",
    "test_quickstart.py",
    "test_text_only_rank.py",
    "test_trajectories.py",
    "test_teacher_cache.py",
    "test_models_lora.py",
    "test_trained_tower.py",
    "test_training_slices.py",
    "test_engines.py",
    "test_assembly_teacher_cache.py",
    "test_assembly_pipeline.py",
    "test_training_trainer.py",
    "test_end_to_end_text_only.py",
    "test_faults.py",
    "test_rank_faults.py",
    "test_assembly_run_dir.py",
    "test_docs_your_data.py",
    "test_core_install.py",
    "test_data_worker_processes.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


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


@pytest.fixture(scope="session")
def quick_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """PATH of scripts under test, on which `llava-kd` starts in a moment; see `quick_commands`."""
    commands = QuickCommands(tmp_path_factory.mktemp("bin"))
    yield os.pathsep.join([str(commands.bin_dir), str(Path(sys.executable).parent), os.environ["PATH"]])
    commands.close()


@pytest.fixture
def stage(tmp_path: Path, shapes_dir: Path, student_dir: Path, teacher_dir: Path):
    """Writes the YAML of a small stage and returns its path: `stage("name", **changes)`."""

    def write(name: str, **changes: object) -> Path:
        return write_stage(
            tmp_path / name, data=shapes_dir, student=student_dir, teacher=teacher_dir, **changes
        )

    return write


@pytest.fixture(scope="session")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's teacher, whose answers end, moved a little so that it is no teacher of itself."""
    parts = load_stock(str(Path(__file__).parents[1] / "scripts" / "quickstart" / "backbones" / "teacher"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parts.stock.model.language_model.parameters():
            parameter += 0.02 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    out = tmp_path_factory.mktemp("speaker") / "model"
    save_stock(Parts(stock=parts.stock, processor=parts.processor), out)
    return out
