"""Diagnostics on two ranks, under every engine, are those of one device."""

from __future__ import annotations

import json
from pathlib import Path

import extra_terms
import pytest
import ranks

pytestmark = pytest.mark.distributed

# A term with weights of its own is computed a second time where its module may be sharded.
ASKED = [
    "--log.diagnostics_every=2",
    f"--plugins=[{extra_terms.__file__}]",
    "--objective.mapped={weight: 0.5}",
]
# DeepSpeed takes half a minute to start: what it shards, weights and all, is tried in every run of the tests.
ENGINES = [
    "ddp",
    "fsdp2",
    "zero3",
    pytest.param("zero2", marks=pytest.mark.slow),
    pytest.param("zero1", marks=pytest.mark.slow),
]


def diagnosed(output: Path) -> dict[int, dict[str, float]]:
    logged = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: {n: v for n, v in line.items() if n.count("/")} for line in logged}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, shapes_dir: Path, student_dir: Path, teacher_dir: Path):
    """One-device run of a distilled stage, the YAML it came from, and its diagnostics."""
    from tiny_runs import write_stage

    root = tmp_path_factory.mktemp("diagnosed")
    config = write_stage(root / "one", data=shapes_dir, student=student_dir, teacher=teacher_dir, max_steps=3)
    ranks.train(config, root / "one", *ASKED)
    found = diagnosed(root / "one")
    assert [len(figures) for figures in found.values()] == [16, 16, 16]
    assert "gradient/mapped" in found[1]
    return config, root, found


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_say_what_one_device_says(one, engine: str) -> None:
    config, root, expected = one
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")
    ranks.train(config, root / engine, *ASKED, *ranks.ENGINES[engine], ranks=2)
    got = diagnosed(root / engine)
    assert got.keys() == expected.keys()
    for step, figures in expected.items():
        assert got[step] == pytest.approx(figures, rel=1e-4, abs=1e-6), step
