"""The three stages chained on CPU, as the scripts chain them, and resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from llava_kd.cli import main


def run(config: Path, *overrides: str) -> Path:
    assert main(["train", str(config), *overrides]) == 0
    return Path(next(line for line in config.read_text().splitlines() if "output_dir" in line).split(": ")[1])


def lines(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return LlavaForConditionalGeneration.from_pretrained(output / "model").state_dict()


def test_the_three_stages_chain_into_a_stock_student(stage) -> None:
    first = run(stage("stage1", template="plain", trainable=("multi_modal_projector",)))
    second = run(stage("stage2", distilled=False), f"--student.checkpoint={first / 'model'}")
    third = run(stage("stage3"), f"--student.checkpoint={second / 'model'}")
    for output, terms in (
        (first, {"cross_entropy", "response_kl", "visual_kl", "relation"}),
        (second, {"cross_entropy"}),
        (third, {"cross_entropy", "response_kl", "visual_kl", "relation"}),
    ):
        logged = lines(output)
        assert [line["step"] for line in logged] == [1, 2, 3]
        assert terms <= logged[-1].keys()
        assert all(line["loss"] > 0 for line in logged)
    before, after = weights(first), weights(third)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("multi_modal_projector" in name for name in moved)
    assert any("language_model" in name for name in moved)
    assert not any("vision_tower" in name for name in moved)


def test_a_projector_only_stage_moves_nothing_else(stage, student_dir: Path) -> None:
    output = run(stage("stage1", template="plain", trainable=("multi_modal_projector",)))
    before = LlavaForConditionalGeneration.from_pretrained(student_dir).state_dict()
    after = weights(output)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "multi_modal_projector" in name}


class Died(BaseException):
    """The process ends here, by nothing that a command would turn into a line."""


@pytest.mark.parametrize(
    "trainable", [("multi_modal_projector",), ("multi_modal_projector", "language_model")]
)
def test_a_run_resumed_twice_ends_bit_for_bit_where_an_undisturbed_one_does(
    stage, trainable: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(stage("whole", trainable=trainable, max_steps=6, checkpoint={"every": 2, "keep": 1}))
    config = stage("parts", trainable=trainable, max_steps=6, checkpoint={"every": 2, "keep": 1})
    from llava_kd.training import trainer

    original = trainer.Trainer._save
    for stop_after in (2, 4):

        def save_then_die(
            self, done: int, figures: Mapping[str, float], stop_after: int = stop_after
        ) -> None:
            original(self, done, figures)
            if done == stop_after:
                raise Died

        monkeypatch.setattr(trainer.Trainer, "_save", save_then_die)
        with pytest.raises(Died):
            run(config)
    monkeypatch.setattr(trainer.Trainer, "_save", original)
    parts = run(config)
    assert [line["step"] for line in lines(parts)] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(lines(whole), lines(parts), strict=True):
        assert a["loss"] == b["loss"]
    expected, got = weights(whole), weights(parts)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_packed_stage_runs_and_logs_the_same_terms(stage) -> None:
    packed = run(stage("packed"), "--data.packing.max_tokens=1024", "--data.packing.packs_per_step=4")
    last = lines(packed)[-1]
    assert {"cross_entropy", "response_kl", "visual_kl", "relation"} <= last.keys()
    assert last["images"] > 4  # more records than rows
    assert last["tokens"] / last["token_places"] > 0.5
