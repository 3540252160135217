"""eval/ tells the truth: benchmarks.yaml, README and scripts agree with the code."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import tiny_benchmarks as tiny
import yaml
from tiny_llava import make_tiny_llava

from llava_kd.evaluation.answers import read_lines
from llava_kd.evaluation.benchmarks.catalogue import BENCHMARKS
from llava_kd.evaluation.benchmarks.run import describe, verify

EVAL = Path(__file__).parents[1] / "eval"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EVAL / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_benchmarks_yaml_lists_what_the_code_reads() -> None:
    listed = yaml.safe_load((EVAL / "benchmarks.yaml").read_text())
    assert list(listed) == list(BENCHMARKS)
    for name, benchmark in BENCHMARKS.items():
        assert tuple(listed[name]["files"]) == benchmark.files
        assert listed[name]["images"] == benchmark.images
        assert ("scored_by" in listed[name]) == (benchmark.score is None)


def test_the_readme_names_every_benchmark_file_and_count() -> None:
    readme = (EVAL / "README.md").read_text()
    for name, benchmark in BENCHMARKS.items():
        assert name in readme
        for file in benchmark.files:
            stem = Path(file).name
            assert (
                stem in readme
                or stem.replace("random", "{random,popular,adversarial}") in readme
                or any(stem == f"coco_pope_{category}.json" for category in ("popular", "adversarial"))
            )


@pytest.mark.parametrize("name", ["run.sh", "lmms_eval.sh"])
def test_a_script_is_sound_bash_and_asks_for_what_it_needs(name: str) -> None:
    assert subprocess.run(["bash", "-n", EVAL / name]).returncode == 0
    done = subprocess.run(
        ["bash", EVAL / name], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"}
    )
    assert done.returncode != 0
    assert "MODEL: stock LLaVA directory" in done.stderr


def test_a_description_says_what_is_missing_and_what_is_ready(tmp_path: Path) -> None:
    text = describe(verify("pope,gqa", tmp_path))
    assert text.count("is not there") == 6
    assert "ready" not in text


def test_empty_answers_of_lmms_eval_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check = script("lmms_eval_check")
    path = tmp_path / "model" / "1_samples_mme.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"filtered_resps": [answer]}) + "\n" for answer in ("Yes", "", " ")))
    assert check.empty_answers(tmp_path) == {"1_samples_mme.jsonl": (2, 3)}


def test_one_damaged_picture_does_not_stop_the_script(tmp_path: Path, quick_path: str) -> None:
    """It checks the files first, and goes on to the answers: that one counts as wrong."""
    model = make_tiny_llava(tmp_path / "model", layers=1)
    tiny.write_gqa(tmp_path / "data")
    path = tmp_path / "data/gqa/images/n2.jpg"
    path.write_bytes(path.read_bytes()[:40])
    places = {"MODEL": str(model), "DATA": str(tmp_path / "data"), "OUT": str(tmp_path / "out")}
    done = subprocess.run(
        ["bash", EVAL / "run.sh", "--max_new_tokens=2"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={
            **os.environ,
            **places,
            "BENCHMARKS": "gqa",
            "NPROC": "1",
            "PATH": quick_path,
        },
    )
    assert done.returncode == 0, done.stderr
    answers = read_lines(tmp_path / "out/gqa/answers.jsonl")
    assert [answer["id"] for answer in answers if "error" in answer] == ["202"]
    assert len(answers) == 3
    assert "1 of 3 questions have no readable picture" in done.stdout
