"""Teachers fused by agreement, and information that a label leaves: on two ranks as on one device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ranks
import torch
from safetensors.torch import load_file
from tiny_llava import make_tiny_llava
from tiny_runs import write_stage

pytestmark = pytest.mark.distributed
NAMES = ("loss", "grad_norm", "cross_entropy", "response_kl", "mcmi", "teacher_weight/1", "teacher_weight/2")


def test_two_ranks_fuse_teachers_and_tell_information_as_one_device(
    tmp_path: Path, shapes_dir: Path, student_dir: Path, teacher_dir: Path
) -> None:
    """Both at once, of a model that is tuned while teachers teach it; each record weighs its own teachers."""
    other = make_tiny_llava(tmp_path / "other", hidden=32, vocab_size=288)
    terms = {"cross_entropy": {"weight": 1.0}, "response_kl": {"weight": 1.0}}
    terms["mcmi"] = {"weight": 1.0, "temperature": 2.0, "clamp": 100.0, "margin": 5.0}
    parts = {"data": shapes_dir, "student": student_dir, "teacher": teacher_dir}
    config = write_stage(tmp_path / "run", **parts, max_steps=2, engine="auto", objective=terms)
    logs, told, stored = [], [], []
    for count in (1, 2):
        file = tmp_path / f"centroids{count}"
        words = ["data", "centroids", str(config), "--out", str(file)]
        ended = ranks.Ranks(words, tmp_path / f"log{count}", ranks=count).wait()
        assert set(ended.codes) == {0}, ended.log
        logs.append(ended.logs[0].split(": ")[0])
        stored.append(load_file(file))
        output = tmp_path / f"ranks{count}"
        several = f"--teacher.several={{checkpoints: [{other}], weights: agreement}}"
        ranks.train(config, output, several, f"--objective.mcmi.centroids={file}", ranks=count)
        lines = (output / "metrics.jsonl").read_text().splitlines()
        told.append([{name: json.loads(line)[name] for name in NAMES} for line in lines])
    one, two = stored
    assert two.keys() == one.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-6, atol=1e-9, msg=name)
    assert len(told[0]) == len(told[1]) == 2
    for a, b in zip(*told, strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-6)
        assert 0.001 < a["teacher_weight/2"] < 0.999
        assert a["mcmi"] < -1e-5
