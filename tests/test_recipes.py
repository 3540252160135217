"""Every shipped recipe loads, says what the method says, and is the one that its script runs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from llava_kd.assembly.pipeline import read_pipeline
from llava_kd.assembly.settings import load
from llava_kd.config import dump

SCRIPTS = Path(__file__).parents[1] / "scripts"
RECIPES = sorted(path for path in SCRIPTS.rglob("*.yaml") if path.name != "pipeline.yaml")
STAGES = sorted(SCRIPTS.glob("stage*.sh"))


def name(path: Path) -> str:
    return str(path.relative_to(SCRIPTS))


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_a_shipped_recipe_loads_and_survives_a_round_trip(recipe: Path, tmp_path: Path) -> None:
    config = load(recipe)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump(config))
    assert load(copy) == config


def test_there_are_three_stages_with_a_recipe_each() -> None:
    assert [path.name for path in STAGES] == ["stage1_dpt.sh", "stage2_sft.sh", "stage3_dft.sh"]
    assert all(path.with_suffix(".yaml") in RECIPES for path in STAGES)


@pytest.mark.parametrize("script", STAGES, ids=name)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_stage_script_hands_its_own_recipe_and_the_overrides_on(
    script: Path, processes: int, tmp_path: Path
) -> None:
    stub = tmp_path / "python"  # a stand-in that says how it was called
    stub.write_text('#!/bin/sh\necho "$(basename "$0") $*"\n')
    stub.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NPROC": str(processes)}
    environment.pop("CONFIG", None)
    command = ["bash", str(script), "--optim.lr=1", "--output_dir=a b"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=tmp_path)
    called = done.stdout.strip()
    program = "assembly.runs.supervise python -m llava_kd.assembly.runs.torchrun" if processes > 1 else "cli"
    assert called.startswith(f"python -m llava_kd.{program} ")
    assert called.endswith(f"llava_kd.cli train {script.with_suffix('.yaml')} --optim.lr=1 --output_dir=a b")
    assert (f"--nproc-per-node {processes}" in called) == (processes > 1)


def test_the_shipped_pipeline_is_the_three_stages() -> None:
    pipeline = read_pipeline(SCRIPTS / "pipeline.yaml")
    assert [stage.path for stage in pipeline.stages] == [path.with_suffix(".yaml") for path in STAGES]
    assert pipeline.command == ("bash", str(SCRIPTS / "train.sh"))


def test_each_stage_goes_on_from_the_one_before() -> None:
    first, second, third = (load(path.with_suffix(".yaml")) for path in STAGES)
    assert second.student.checkpoint == f"{first.output_dir}/model"
    assert third.student.checkpoint == f"{second.output_dir}/model"


def test_the_recipes_train_and_weigh_what_the_paper_says() -> None:
    first, second, third = (load(path.with_suffix(".yaml")) for path in STAGES)
    assert first.trainable == ["multi_modal_projector"]
    assert set(second.trainable) == set(third.trainable) == {"multi_modal_projector", "language_model"}
    assert [(c.optim.lr, c.global_batch_size, c.epochs) for c in (first, second, third)] == [
        (1e-3, 256, 1),
        (2e-5, 128, 1),
        (2e-5, 128, 1),
    ]
    assert not second.objective.needs_teacher
    for config in (first, third):
        terms = config.objective
        assert terms.cross_entropy is not None
        assert terms.response_kl is not None
        assert terms.visual_kl is not None
        assert terms.relation is not None
        weights = [
            t.weight for t in (terms.cross_entropy, terms.response_kl, terms.visual_kl, terms.relation)
        ]
        assert weights == [1.0, 1.0, 1.0, 0.5]
        assert terms.response_kl.temperature == terms.visual_kl.temperature == 1.0
        assert terms.relation.tap == "logits"
