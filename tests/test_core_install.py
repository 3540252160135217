"""The core packages are enough for a stage: no package of an extra is needed, as in the quickstart."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Packages of the extras, hidden from imports and from whoever asks whether they are installed.
HIDDEN = """
import importlib.abc, importlib.util, sys

EXTRAS = {"torchvision", "timm", "open_clip", "deepspeed", "wandb", "tensorboard", "simplejpeg", "pyarrow"}
find_spec = importlib.util.find_spec

class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in EXTRAS:
            raise ModuleNotFoundError(name)

importlib.util.find_spec = lambda name, *a: None if name.partition(".")[0] in EXTRAS else find_spec(name, *a)
sys.meta_path.insert(0, Hide())
"""


def run_without_extras(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HIDDEN + code], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_a_stage_runs_to_its_end(shapes_dir: Path, tmp_path: Path) -> None:
    words = [
        "train",
        "scripts/quickstart/stage1_dpt.yaml",
        f"--data.path={shapes_dir / 'captions.json'}",
        f"--data.images={shapes_dir}",
        f"--output_dir={tmp_path / 'run'}",
        "--global_batch_size=2",
        "--micro_batch_size=2",
        "--max_steps=1",
    ]
    done = run_without_extras(f"from llava_kd.cli import main\nsys.exit(main({words!r}))")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "model" / "config.json").is_file()


def test_what_an_extra_adds_names_the_extra(tmp_path: Path) -> None:
    adders = f"""
import torch
from llava_kd.models.towers.loading import load_tower
from llava_kd.training.trackers import TensorBoardTracker, WandbRun, WandbTracker
name = "timm:vit_tiny_patch16_224?pretrained=false"
for add in (
    lambda: load_tower(name, feature_layer=-2, dtype=torch.float32, seed=0),
    lambda: TensorBoardTracker({str(tmp_path)!r}),
    lambda: WandbTracker('.', WandbRun(project='p', name='n'), config={{}}),
):
    try:
        add()
    except (ImportError, ValueError) as error:
        print(error)
"""
    said = run_without_extras(adders).stdout.splitlines()
    for extra, line in zip(("towers", "tensorboard", "wandb"), said, strict=True):
        assert f"pip install 'llava_kd[{extra}]'" in line
