"""A stage whose teacher is asked without the picture too: splits, packing, resume, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_assembly_several import alike
from test_assembly_token_policy import metrics, refused

from llava_kd.cli import main

KL = {"cross_entropy": {"weight": 1.0}, "response_kl": {"weight": 1.0}}
DEPENDENCY = "--teacher.visual_dependency={by: vds, top: 0.3, mass: 1.0}"


def test_neither_packing_nor_splits_change_a_run(stage) -> None:
    config = stage("run", objective=KL, max_steps=2, global_batch_size=30, micro_batch_size=15)
    words = ["--teacher.visual_dependency={by: va, top: 0.3, mass: 0.8, picture: pixelated, cells: 2}"]
    plain = metrics(config, "plain", *words)
    assert plain[0]["visual_dependency"] > 0
    assert 0 < plain[0]["visual_tokens_share"] < 0.6
    alike(plain, metrics(config, "split", *words, "--micro_batch_size=3"))
    packs = "--data.packing={max_tokens: 100000, max_images: 30, packs_per_step: 1}"
    sizes = ["--global_batch_size=1", "--micro_batch_size=1"]
    alike(plain, metrics(config, "packed", *words, packs, *sizes))
    alike(plain, metrics(config, "reference", *words, "--objective.losses=reference"))
    off = metrics(config, "off")
    assert off[0]["response_kl"] != pytest.approx(plain[0]["response_kl"], rel=1e-3)
    assert off[0]["cross_entropy"] == pytest.approx(plain[0]["cross_entropy"], rel=1e-5)
    assert "visual_dependency" not in off[0]


def test_a_run_goes_on_with_the_same_weighing_alone(stage, capsys) -> None:
    config = stage("run", objective=KL, max_steps=2, checkpoint={"every": 1, "keep": 2})
    metrics(config, "half", DEPENDENCY, "--max_steps=1", "--optim.warmup_ratio=0.03")
    output = f"--output_dir={config.parent / 'half'}"
    for change in ([], [DEPENDENCY, "--teacher.visual_dependency.picture=blurred"]):
        assert "visual_dependency" in refused(config, capsys, output, *change)


def test_a_further_target_trains_alike_however_a_step_is_cut(stage) -> None:
    config = stage("run", objective=KL, max_steps=2, global_batch_size=30, micro_batch_size=15)
    words = [DEPENDENCY, "--teacher.visual_dependency.gamma=2"]
    plain = metrics(config, "plain", *words)
    alike(plain, metrics(config, "split", *words, "--micro_batch_size=3"))
    without = metrics(config, "without", DEPENDENCY)
    assert plain[0]["response_kl"] != pytest.approx(without[0]["response_kl"], rel=1e-2)
    assert plain[0]["visual_dependency"] == pytest.approx(without[0]["visual_dependency"], rel=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--teacher.cache=x", "--teacher.visual_dependency.gamma=2"],
            "`teacher.cache` (x) stores only one number per token of the teacher's prediction",
        ),
        (
            ["--teacher.several={checkpoints: [/nowhere], weights: uniform}"],
            "`teacher.visual_dependency` works with one teacher",
        ),
        (["--pictures={mixup: {}}"], "`teacher.visual_dependency` removes them"),
        (["--objective.response_kl=null"], "weights response_kl, which `objective` does not have; add it"),
        (["--teacher.visual_dependency.top=0"], "teacher.visual_dependency.top"),
        (["--teacher.visual_dependency.top=nan"], "teacher.visual_dependency"),
        (["--teacher.visual_dependency.mass=0.2"], "must be at least `top` (0.3)"),
        (["--teacher.visual_dependency.by=trust"], "trust"),
        (["--teacher.visual_dependency.gamma=-1"], "teacher.visual_dependency.gamma"),
        (
            ["--teacher.visual_dependency.gamma=2", "--objective.response_kl.divergence=jsd"],
            "needs divergence forward or reverse, and a number as temperature, in `objective.response_kl`",
        ),
        (
            ["--teacher.visual_dependency.gamma=2", "--engine.kind=fsdp2"],
            "was not tested with `engine.kind` fsdp2",
        ),
        (["--teacher.visual_dependency.picture=absent"], "absent"),
        (["--teacher.visual_dependency.cells=0"], "teacher.visual_dependency.cells"),
    ],
)
def test_what_does_not_fit_is_refused(stage, capsys, words: list[str], message: str) -> None:
    objective = {**KL, "visual_kl": {"weight": 1.0}}
    config = stage("run", objective=objective)
    assert message in refused(config, capsys, DEPENDENCY, *words)


@pytest.mark.parametrize("mode", [[], ["--mode=topk", "--topk=259"]], ids=["hidden", "topk"])
def test_scores_from_a_cache_are_those_of_the_live_teacher(mode: list[str], stage, tmp_path: Path) -> None:
    """Each record alone, packed, and with other shares than it was written with."""
    config, out = stage("run", objective=KL, max_steps=2), tmp_path / "cache"
    asked = "--teacher.visual_dependency={by: va, top: 0.3, mass: 0.8, picture: pixelated, cells: 2}"
    assert main(["cache-teacher", str(config), f"--out={out}", asked, *mode]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["contents"]["dependency"] == "va, pixelated at 2 x 2"
    packs = "--data.packing={max_tokens: 600, packs_per_step: 2}"
    for words in (
        ["--micro_batch_size=1"],
        [packs, "--micro_batch_size=1"],
        ["--teacher.visual_dependency.top=0.2", "--teacher.visual_dependency.mass=1"],
    )[: 1 if mode else 3]:
        live = metrics(config, "live", asked, *words)
        cached = metrics(config, "cached", asked, *words, f"--teacher.cache={out}")
        assert 0 < live[0]["visual_tokens_share"] < 0.6
        for a, b in zip(live, cached, strict=True):
            for name in ("loss", "response_kl", "grad_norm", "visual_dependency", "visual_tokens_share"):
                assert b[name] == pytest.approx(a[name], rel=1e-5, abs=1e-7), name
        for run in ("live", "cached"):
            shutil.rmtree(config.parent / run)


def test_a_cache_of_no_scores_or_of_others_is_refused_by_name(stage, tmp_path: Path, capsys) -> None:
    config, plain, other = stage("run", objective=KL, max_steps=1), tmp_path / "plain", tmp_path / "other"
    assert main(["cache-teacher", str(config), f"--out={plain}"]) == 0
    assert main(["cache-teacher", str(config), f"--out={other}", DEPENDENCY]) == 0
    capsys.readouterr()
    said = refused(config, capsys, f"--teacher.cache={plain}", DEPENDENCY)
    assert "the scores that `teacher.visual_dependency` needs (vds, grey): it has none." in said
    words = [DEPENDENCY, "--teacher.visual_dependency.picture=blurred"]
    said = refused(config, capsys, f"--teacher.cache={other}", *words)
    assert "needs (vds, blurred at 4 x 4): it has those of vds, grey." in said
    assert main(["cache-teacher", str(config), f"--out={plain}", DEPENDENCY]) != 0
    assert "holds a different cache" in " ".join(capsys.readouterr().err.split())
    same = [metrics(config, run, f"--teacher.cache={cache}") for run, cache in (("a", plain), ("b", other))]
    assert same[0][0]["loss"] == same[1][0]["loss"]  # whoever does not ask for scores may use either


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--teacher.visual_dependency.gamma=2"],
            "`teacher.visual_dependency.gamma` 2 needs the whole prediction",
        ),
        (
            ["--mode=topk", "--topk=4", "--server=http://127.0.0.1:9"],
            "a server predicts only with the picture",
        ),
    ],
)
def test_what_no_score_serves_is_not_cached(words: list[str], message: str, stage, tmp_path, capsys) -> None:
    config = stage("run", objective=KL)
    assert main(["cache-teacher", str(config), f"--out={tmp_path / 'cache'}", DEPENDENCY, *words]) != 0
    assert message in " ".join(capsys.readouterr().err.split())
