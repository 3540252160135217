"""scripts/compare_losses.sh: equal code gives equal figures, and anything that moved is named."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "compare_losses.py"
RECIPE = "scripts/quickstart/stage1_dpt.yaml"


def _script():
    spec = importlib.util.spec_from_file_location("compare_losses", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_last_bit_of_a_figure_or_weight_is_a_difference() -> None:
    script = _script()
    weight_N = torch.tensor([1.0, 2.0])
    first = script.Outcome([{"loss": 0.1}], {"w": weight_N})
    assert script.differences(first, script.Outcome([{"loss": 0.1}], {"w": weight_N.clone()})) == []
    above_N = torch.nextafter(weight_N, torch.tensor(3.0))
    others = {
        "step 1: loss": script.Outcome([{"loss": 0.1 + 2e-17}], {"w": weight_N}),
        "weight w differs": script.Outcome([{"loss": 0.1}], {"w": above_N}),
        "weight w is only in the first": script.Outcome([{"loss": 0.1}], {}),
        "weight w (2,) torch.float32 -> (2,) torch.bfloat16": script.Outcome(
            [{"loss": 0.1}], {"w": weight_N.bfloat16()}
        ),
        "1 -> 0 steps": script.Outcome([], {"w": weight_N}),
        "step 1: relation None -> 0.5": script.Outcome([{"loss": 0.1, "relation": 0.5}], {"w": weight_N}),
    }
    for expected, other in others.items():
        found = script.differences(first, other)
        assert len(found) == 1, expected
        assert found[0].startswith(expected)


@pytest.mark.slow
def test_a_planted_change_of_a_loss_is_named_and_the_same_code_is_equal(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for folder in ("llava_kd", "scripts"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))

    def compare(scratch: str) -> subprocess.CompletedProcess[str]:
        words = [f"a={ROOT}", f"b={copy}", "--scratch", str(tmp_path / scratch), "--steps", "3", RECIPE]
        command = [sys.executable, str(SCRIPT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    same = compare("same")
    assert same.returncode == 0, same.stderr
    assert f"{RECIPE}: equal" in same.stdout
    path = copy / "llava_kd" / "training" / "schedule.py"
    bug = path.read_text().replace("math.pi", "3.1")
    assert bug != path.read_text()
    path.write_text(bug)
    moved = compare("moved")
    assert moved.returncode == 1, moved.stderr
    assert f"{RECIPE}: MOVED" in moved.stdout
    assert "weight" in moved.stdout
