"""A stage with a policy for private tokens: packed, cached, resumed, and refused where it does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from llava_kd.cli import main

POLICY = {
    "spans": [{"regex": r"\d+|red|blue|yes"}, {"regex": "no", "score": 0.5}],
    "temperature": 20.0,
    "noise": 0.5,
}
KL = {"cross_entropy": {"weight": 1.0}, "response_kl": {"weight": 1.0}}
SAME = ("loss", "cross_entropy", "response_kl", "grad_norm", "private_share")
TOP_K = ["--mode=topk", "--topk=8"]


def metrics(config: Path, name: str, *words: str) -> list[dict]:
    output = config.parent / name
    assert main(["train", str(config), f"--output_dir={output}", *words]) == 0
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def guarded(stage, name: str = "run", policy: dict | None = None, **changes: object) -> Path:
    return stage(name, token_policy={**POLICY, **(policy or {})}, objective=KL, **changes)


def refused(config: Path, capsys, *words: str) -> str:
    assert main(["train", str(config), *words]) != 0
    return " ".join(capsys.readouterr().err.split())


def alike(one: list[dict], other: list[dict]) -> None:
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        for name in SAME:
            assert b[name] == pytest.approx(a[name], rel=2e-5), (a["step"], name)


def test_neither_packing_nor_splits_change_a_run(stage) -> None:
    # As many rows a step as records, so that a step holds the same ones.
    config = guarded(stage, max_steps=2, global_batch_size=30, micro_batch_size=15)
    plain = metrics(config, "plain")
    assert 0.01 < plain[0]["private_share"] < 0.9
    alike(plain, metrics(config, "split", "--micro_batch_size=3"))
    packs = "--data.packing={max_tokens: 100000, max_images: 30, packs_per_step: 1}"
    sizes = ["--global_batch_size=1", "--micro_batch_size=1", packs]
    targets = ["--token_policy.noise=0.0"]  # drawn by step: the same step holds all records in both
    alike(metrics(config, "quiet", *targets), metrics(config, "packed", *targets, *sizes))
    alike(plain, metrics(config, "packed_noise", *sizes))


def test_the_fused_head_and_the_plain_one_train_alike(stage) -> None:
    config = guarded(stage, max_steps=3)
    alike(metrics(config, "fast"), metrics(config, "plain", "--objective.losses=reference"))


def test_a_cache_of_hidden_states_serves_a_policy(stage, tmp_path: Path) -> None:
    config = guarded(stage, max_steps=3)
    assert main(["cache-teacher", str(config), f"--out={tmp_path / 'hidden'}"]) == 0
    alike(metrics(config, "live"), metrics(config, "cached", f"--teacher.cache={tmp_path / 'hidden'}"))


def test_a_cache_of_the_largest_logits_serves_weights_and_is_refused_the_rest(
    stage, tmp_path: Path, capsys
) -> None:
    config = guarded(stage, max_steps=2)
    weighs = ["--token_policy.temperature=null", "--token_policy.noise=0"]
    assert main(["cache-teacher", str(config), f"--out={tmp_path / 'top'}", *TOP_K, *weighs]) == 0
    cached = f"--teacher.cache={tmp_path / 'top'}"
    assert "token_policy.temperature or noise" in refused(config, capsys, cached)
    kept = metrics(config, "kept", cached, *weighs)
    dropped = metrics(config, "dropped", cached, *weighs, "--token_policy.kl=0.0")
    assert dropped[0]["response_kl"] < kept[0]["response_kl"]


def test_private_tokens_can_be_dropped_without_a_teacher(stage) -> None:
    config = guarded(stage, policy={"temperature": None, "noise": 0.0}, distilled=False, max_steps=1)
    tree = yaml.safe_load(config.read_text())
    tree["objective"] = {"cross_entropy": {"weight": 1.0}}
    config.write_text(yaml.safe_dump(tree))
    dropped = metrics(config, "dropped")[0]
    whole = metrics(config, "whole", "--token_policy=null")[0]
    assert dropped["private_share"] > 0
    assert dropped["cross_entropy"] < whole["cross_entropy"]
    assert "private_share" not in whole


def test_a_hard_label_that_stays_is_said(stage, capsys) -> None:
    config = guarded(stage, policy={"cross_entropy": 0.5}, max_steps=1)
    metrics(config, "said")
    assert "hard labels teach the private tokens themselves" in capsys.readouterr().err


def test_a_dry_run_says_what_the_policy_does(stage, capsys) -> None:
    config = guarded(stage)
    assert main(["train", str(config), "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "at score 1: teacher at temperature 20, noise 0.5, divergence x 1, hard label x 0" in said
    assert main(["train", str(config), "--dry_run", "--token_policy=null"]) == 0
    assert "private tokens" not in capsys.readouterr().out


def test_a_run_goes_on_under_its_own_policy_alone(stage, capsys) -> None:
    config = guarded(stage, max_steps=4, checkpoint={"every": 2, "keep": 2})
    whole = metrics(config, "whole")
    half = metrics(config, "half", "--max_steps=2", "--optim.warmup_ratio=0.03")
    assert len(half) == 2
    output = f"--output_dir={config.parent / 'half'}"
    for change in ("--token_policy.temperature=30", "--token_policy=null", "--token_policy.noise=0.1"):
        assert "token_policy" in refused(config, capsys, output, change)
    assert len(whole) == 4


def test_a_span_outside_its_answer_makes_a_bad_record(stage, shapes_dir: Path, tmp_path: Path) -> None:
    entries = json.loads((shapes_dir / "instructions.json").read_text())
    entries[0]["private_spans"] = [{"start": 0, "stop": 9999}]
    (tmp_path / "spans.json").write_text(json.dumps(entries))
    words = [f"--data.path={tmp_path / 'spans.json'}", "--token_policy.record_spans=true"]
    output = tmp_path / "run"
    metrics(guarded(stage, max_steps=8), "run", *words)
    named = (output / "bad_records.jsonl").read_text()
    assert entries[0]["id"] in named
    assert "must lie inside its answer" in named


@pytest.mark.parametrize(
    ("policy", "words", "message"),
    [
        ({"spans": [{"pattern": "emial"}]}, [], "must be one of email, phone, digits"),
        ({"spans": [{"regex": "(("}]}, [], "must be a regular expression"),
        ({"spans": [{"regex": "a", "pattern": "email"}]}, [], "must each have either `pattern` or `regex`"),
        ({"spans": []}, [], "`token_policy` needs `spans`"),
        ({"temperature": 0.5}, [], "(0.5) must be at least that of all tokens"),
        ({}, ["--objective.response_kl.temperature=21"], "`objective.response_kl.temperature` (21)"),
        ({}, ["--objective.response_kl.temperature=std"], "need a number as `objective.response_kl"),
        ({}, ["--objective.text_relation={weight: 1.0}"], "does not reach text_relation"),
        ({}, ["--objective.response_dbild={weight: 1.0}"], "does not reach response_dbild"),
        (
            {},
            ["--objective.response_kl=null", "--objective.visual_kl={weight: 1.0}"],
            "no term compares them",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_a_model_is_read(
    stage, capsys, policy: dict, words: list[str], message: str
) -> None:
    config = guarded(stage, policy=policy)
    assert message in refused(config, capsys, *words)
    assert main(["train", str(config), "--dry_run", *words]) != 0
    assert message in " ".join(capsys.readouterr().err.split())
