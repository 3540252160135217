"""Stages whose micro-batches, or all of them, hold no picture: every option trains, and to finite losses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml
from tiny_llava import make_tiny_llava

from llava_kd.cli import main

SWITCH = "--objective.visual_switch={source: projector}"
OPTIONS: dict[str, list[str]] = {
    "plain": [],
    "lent terms": ["--objective.attention={}", "--objective.response_dbild={}", SWITCH],
    "relation at the projector": ["--objective.relation.tap=projector"],
    "trained tower": [
        "--trainable=[vision_tower, multi_modal_projector, language_model]",
        "--objective.relation.tap=projector",
        "--objective.visual_switch={source: tower}",
    ],
    "packed": [
        "--data.packing.max_tokens=512",
        "--data.packing.packs_per_step=8",
        "--objective.attention={}",
    ],
    "checkpointed": ["--engine.activation_checkpointing=true", "--objective.attention={}"],
    "adapters": ["--student.lora={rank: 2}", "--trainable=[language_model]"],
    "offloaded teacher": ["--teacher.placement=cpu_offload"],
    "reference formulas": ["--objective.losses=reference", "--objective.attention={}"],
}


@pytest.fixture(scope="module")
def records(shapes_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of records without pictures, and of records of which every second has one."""
    root = tmp_path_factory.mktemp("records")
    entries = json.loads((shapes_dir / "instructions.json").read_text())[:12]
    for number, entry in enumerate(entries):
        if number % 2:
            entry.pop("image")
            for turn in entry["conversations"]:
                turn["value"] = turn["value"].replace("<image>", "").strip()
    files = {"some": entries, "none": entries[1::2]}
    for name, kept in files.items():
        (root / f"{name}.json").write_text(json.dumps(kept))
    return {name: root / f"{name}.json" for name in files}


def train(config: Path, *overrides: str) -> list[dict]:
    assert main(["train", str(config), *overrides]) == 0
    text = (config.with_suffix("") / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("is_resampled", "pictures"),
    [(False, "some"), pytest.param(False, "none", marks=pytest.mark.slow), (True, "some"), (True, "none")],
    ids=lambda value: {False: "equal grids", True: "other grids"}.get(value, value),
)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_trains_on_text_alone(
    stage, records: dict[str, Path], tmp_path: Path, option: str, is_resampled: bool, pictures: str
) -> None:
    config = stage("text", micro_batch_size=1, max_steps=2)
    overrides = [f"--data.path={records[pictures]}", *OPTIONS[option]]
    if is_resampled:
        other = make_tiny_llava(tmp_path / "other", image_size=40)
        overrides += [f"--teacher.checkpoint={other}", "--data.visual_alignment=resample"]
    lines = train(config, *overrides)
    assert len(lines) == 2
    assert all(math.isfinite(line["loss"]) and line["loss"] > 0 for line in lines)
    assert all(line["grad_norm"] > 0 for line in lines)
    assert any(line["relation"] > 0 for line in lines) == (pictures == "some")


@pytest.mark.parametrize("top_k", [None, 8], ids=["states", "logits"])
def test_a_cache_of_a_teacher_serves_text_alone(
    stage, records: dict[str, Path], tmp_path: Path, top_k: int | None
) -> None:
    config = stage("cached", micro_batch_size=1, max_steps=2)
    tree = yaml.safe_load(config.read_text())
    tree["data"]["path"] = str(records["none"])
    if top_k is not None:
        tree["objective"].pop("relation")
    config.write_text(yaml.safe_dump(tree))
    cache = ["cache-teacher", str(config), f"--out={tmp_path / 'cache'}"]
    assert main([*cache, *([] if top_k is None else ["--mode=topk", f"--topk={top_k}"])]) == 0
    lines = train(config, f"--teacher.cache={tmp_path / 'cache'}")
    assert all(math.isfinite(line["loss"]) and line["loss"] > 0 for line in lines)
