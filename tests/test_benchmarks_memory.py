"""What `llava-kd check` estimates for a rank is within 15 % of the peak that is measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "memory.py"


def rows(out: Path, *words: str, ranks: int = 1) -> list[dict]:
    """Rows of the benchmark on `ranks` CPU processes."""
    launcher = (
        [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    )
    command = [
        sys.executable,
        *launcher,
        str(BENCHMARK),
        "--device=cpu",
        "--threads=1",
        f"--json={out}",
        *words,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCHMARK.parent.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())["rows"]


@pytest.mark.parametrize(
    ("ranks", "engines"),
    [
        (1, ["single"]),
        pytest.param(2, ["ddp", "fsdp2"], marks=[pytest.mark.slow, pytest.mark.distributed]),
        pytest.param(2, ["zero1", "zero2", "zero3"], marks=[pytest.mark.slow, pytest.mark.distributed]),
    ],
)
def test_the_estimate_is_within_15_percent_of_the_peak(
    tmp_path: Path, ranks: int, engines: list[str]
) -> None:
    """With and without activation checkpointing, in fp32 and bf16, the projector alone and the whole."""
    if "zero1" in engines:
        pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")
    found = rows(tmp_path / "memory.json", "--case=tiny", "--engines", *engines, ranks=ranks)
    assert len(found) == 8 * len(engines)
    for row in found:
        assert row["ratio"] == pytest.approx(1, abs=0.15), row
