"""Options beyond the paper through `llava-kd train`: logged, saved, resumed, refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llava_kd.assembly.settings import load
from llava_kd.cli import main

FREE = "learned_weights.free_K"
OPTIONS = [
    "--objective.response_kl={trust: first}",
    "--objective.visual_kl={share: 0.25}",
    "--objective.relation={centre: true, normalise_rows: true}",
    "--objective.text_relation={normalise_rows: true}",
    "--objective.learned_weights={lr: 0.05, strength: 0.5}",
]


def state(output: Path, step: int) -> dict[str, Tensor]:
    folder = output / "checkpoints" / f"step-{step:08d}"
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def test_learned_weights_are_logged_saved_resumed_and_not_exported(stage: Callable[..., Path]) -> None:
    whole, half = (stage(name, max_steps=3, checkpoint={"every": 1, "keep": 3}) for name in ("whole", "half"))
    for config in (whole, half):
        assert main(["train", str(config), *OPTIONS]) == 0
    output = whole.with_suffix("")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    terms = ("response_kl", "visual_kl", "relation", "text_relation")
    start = dict(zip(terms, (1.0, 1.0, 0.5, 0.5), strict=True))
    assert {name: lines[0][f"weight/{name}"] for name in terms} == pytest.approx(start)
    assert all(lines[2][f"weight/{name}"] != pytest.approx(start[name], rel=1e-3) for name in terms)
    assert "weight/cross_entropy" not in lines[0]
    last = state(output, 3)
    assert {f"{kind}/{FREE}" for kind in ("parameter", "exp_avg", "exp_avg_sq")} <= last.keys()
    # AdamW's first step is as long as the rate, whatever the gradient's scale; the rate is their own.
    first = 0.05 * lines[0]["lr"] / 1e-3
    assert state(output, 1)[f"parameter/{FREE}"].abs().tolist() == pytest.approx([first] * 4, rel=2e-3)
    exported = load_file(output / "model" / "model.safetensors")
    assert not any("learned" in name for name in exported)

    again = half.with_suffix("")
    (again / "run.json").unlink()
    for step in (2, 3):
        shutil.rmtree(again / "checkpoints" / f"step-{step:08d}")
    assert main(["train", str(half), *OPTIONS]) == 0
    resumed = state(again, 3)
    assert resumed.keys() == last.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in last.items())


def test_a_cached_teacher_that_cannot_show_attention_is_refused_by_name(stage: Callable[..., Path]) -> None:
    for asked in ("{share: 0.5}", "{weighed: true}"):
        words = [f"--objective.visual_kl={asked}", "--teacher.cache=somewhere"]
        with pytest.raises(
            ValueError, match=r"objective.visual_kl` need the teacher model itself, but teach"
        ):
            load(stage("cached"), words)
    assert load(stage("whole"), ["--objective.visual_kl={share: 1.0}", "--teacher.cache=somewhere"])


def test_a_run_weighs_by_the_questions_or_by_the_answers(stage: Callable[..., Path]) -> None:
    found = {}
    for by in ("answers", "questions"):
        config = stage(by, max_steps=1)
        assert (
            main(["train", str(config), f"--objective.visual_kl={{weighed: true, looked_at_by: {by}}}"]) == 0
        )
        (line,) = (config.with_suffix("") / "metrics.jsonl").read_text().splitlines()
        found[by] = json.loads(line)
    assert found["answers"]["visual_kl"] != pytest.approx(found["questions"]["visual_kl"], rel=1e-4)
    assert found["answers"]["response_kl"] == pytest.approx(found["questions"]["response_kl"], rel=1e-6)


@pytest.mark.parametrize("trust", ["probability", "better"])
def test_probabilities_of_labels_need_a_cache_at_temperature_1(
    stage: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], trust: str
) -> None:
    objective = "--objective={cross_entropy: {}, response_kl: {temperature: 2.0, trust: TRUST}}"
    first, by_probability = (objective.replace("TRUST", word) for word in ("first", trust))
    config, cache = stage("topk", max_steps=1), tmp_path / "cache"
    assert main(["cache-teacher", str(config), f"--out={cache}", "--mode=topk", "--topk=8", first]) == 0
    assert main(["train", str(config), first, f"--teacher.cache={cache}"]) == 0
    capsys.readouterr()
    assert main(["train", str(stage("other")), by_probability, f"--teacher.cache={cache}"]) == 2
    said = capsys.readouterr().err
    assert "the label's probability, which the trust of response_kl needs" in said
    assert "it was written for temperature 2" in said
    few = objective.replace("TRUST", "label_listed, listed: 8")
    assert main(["train", str(stage("few")), few, f"--teacher.cache={cache}"]) == 0
    more = few.replace("listed: 8", "listed: 9")
    assert main(["train", str(stage("more")), more, f"--teacher.cache={cache}"]) == 2
    assert "the 9 largest logits, which a term needs: it has 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--teacher=null", "--objective={cross_entropy: {}, learned_weights: {}}"],
            "`objective.learned_weights` has no weight to learn: none of cross_entropy reads the teacher",
        ),
        (["--objective.learned_weights={most: 1}"], "`objective.learned_weights.most` must be more than 1"),
        (["--objective.visual_kl={share: 0}"], "`objective.visual_kl.share` must be more than 0"),
        (
            ["--objective.response_kl={trust: label}"],
            "objective.response_kl.trust` must be one of all, first",
        ),
    ],
)
def test_settings_that_cannot_be_are_named(
    stage: Callable[..., Path], words: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(stage("refused"), words)


def test_the_shipped_grid_has_an_arm_for_each_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    words = ["ablate", "ablations/options.yaml", "--dry_run", "--seeds=0", f"--out={tmp_path / 'out'}"]
    assert main(words) == 0, "every stage of every arm has settings that load"
    assert "31,500 steps" in capsys.readouterr().out
    text = Path("ablations/options.yaml").read_text()
    for option in ("normalise_rows", "text_relation", "share", "learned_weights", "trust"):
        assert option in text
