"""A teacher whose decoder layers live elsewhere says what it would say in one place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_batches import inputs, record

from llava_kd.batch import Batch
from llava_kd.cli import main
from llava_kd.distill.teaching.live import Teacher
from llava_kd.models.files.checkpoint import load_stock
from llava_kd.models.mllm import MLLM
from llava_kd.parallel.teacher_placement import offload_layers

BATCH = Batch(student=inputs(record(1), record(2, images=2)), record_ids=("a", "b"))


def test_layers_visit_the_device_one_at_a_time_and_change_nothing(teacher_dir: Path) -> None:
    whole, spread = (MLLM(load_stock(str(teacher_dir)).stock) for _ in range(2))
    layers = list(spread.language_model.layers)
    offload_layers(layers, torch.device("cpu"), torch.float32)
    homes = [[p.data_ptr() for p in layer.parameters()] for layer in layers]

    def away() -> list[int]:
        return [i for i, layer in enumerate(layers) if [p.data_ptr() for p in layer.parameters()] != homes[i]]

    seen: list[list[int]] = []
    for layer in layers:
        layer.self_attn.register_forward_hook(lambda *_: seen.append(away()))
    expected, got = (Teacher(mllm, shares_tower=True)(BATCH) for mllm in (whole, spread))
    assert torch.equal(got.hidden_BTD, expected.hidden_BTD)
    assert seen == [[0], [1]]
    assert away() == []


def test_a_layer_that_fails_goes_home_too(teacher_dir: Path) -> None:
    mllm = MLLM(load_stock(str(teacher_dir)).stock)
    layer = mllm.language_model.layers[0]
    offload_layers([layer], torch.device("cpu"), torch.float32)
    home = layer.mlp.up_proj.weight.data_ptr()

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    layer.mlp.register_forward_hook(fail)
    teacher = Teacher(mllm, shares_tower=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        teacher(BATCH)
    assert layer.mlp.up_proj.weight.data_ptr() == home


def test_a_run_with_an_offloaded_teacher_logs_what_one_with_a_replicated_teacher_does(stage) -> None:
    runs = {name: stage(name, max_steps=2) for name in ("replicated", "cpu_offload")}
    for name, config in runs.items():
        assert main(["train", str(config), f"--teacher.placement={name}"]) == 0
    from test_training_slices import lines, same_weights

    first, second = (config.with_suffix("") for config in runs.values())
    assert [line["loss"] for line in lines(first)] == [line["loss"] for line in lines(second)]
    assert same_weights(first, second)
