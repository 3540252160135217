"""A student that answers its records itself while it trains, from YAML to weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from llava_kd.assembly.parts.on_policy.writer import OwnAnswersLoader, Writer
from llava_kd.assembly.settings import load
from llava_kd.batch import Batch
from llava_kd.cli import main

KL = {"response_kl": {"weight": 1.0, "divergence": "reverse"}}
ASKED = {"share": 1.0, "max_new_tokens": 6, "batch_size": 3}


def lines(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def weights(output: Path) -> dict[str, Tensor]:
    return load_file(output / "model" / "model.safetensors")


def assert_same(a: Path, b: Path) -> None:
    assert [line["loss"] for line in lines(a)] == [line["loss"] for line in lines(b)]
    assert all(torch.equal(value, weights(b)[name]) for name, value in weights(a).items())


def trained(path: Path) -> Path:
    assert main(["train", str(path)]) == 0
    return path.with_suffix("")


def test_a_share_of_0_is_no_option_bit_for_bit(stage) -> None:
    plain = trained(stage("plain", max_steps=4))
    asked = trained(stage("asked", max_steps=4, on_policy={**ASKED, "share": 0.0}))
    assert_same(plain, asked)
    assert all(line["own_answers"] == 0 for line in lines(asked))
    assert [line["cross_entropy"] for line in lines(asked)] == [
        line["cross_entropy"] for line in lines(plain)
    ]


def with_other_answers(data: Path, out: Path) -> Path:
    """The same questions, and answers of other lengths and words."""
    records = json.loads(data.read_text())
    for record in records:
        for number, turn in enumerate(record["conversations"]):
            if turn["from"] == "gpt":
                turn["value"] = "never " * (1 + number % 3)
    out.write_text(json.dumps(records))
    return out


def test_at_a_share_of_1_no_answer_of_the_data_is_read(stage, shapes_dir: Path, tmp_path: Path) -> None:
    changed = with_other_answers(shapes_dir / "instructions.json", tmp_path / "other.json")
    runs = [stage(name, max_steps=3, objective=KL, on_policy=ASKED) for name in ("true", "other")]
    tree = yaml.safe_load(runs[1].read_text())
    tree["data"]["path"] = str(changed)
    runs[1].write_text(yaml.safe_dump(tree))
    assert_same(*map(trained, runs))
    plain = [stage(f"plain {name}", max_steps=3, objective=KL) for name in ("true", "other")]
    plain[1].write_text(plain[1].read_text().replace(str(shapes_dir / "instructions.json"), str(changed)))
    losses = [[line["loss"] for line in lines(trained(path))] for path in plain]
    assert losses[0] != losses[1]  # without the option they are
