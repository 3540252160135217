"""What trains is told by settings and names alone; the model is asked nothing and stays as it is."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import yaml
from tiny_llava import make_tiny_llava

from llava_kd.assembly.parts.identity import frozen_fingerprints
from llava_kd.assembly.planning.estimate import ModelSizes
from llava_kd.assembly.settings import load
from llava_kd.models.files.checkpoint import load_stock
from llava_kd.models.mllm import MLLM
from llava_kd.models.trained import PARTS, trained_names, trained_of

NAMES = (
    "model.vision_tower.layers.0.weight",
    "model.multi_modal_projector.linear_1.weight",
    "model.language_model.layers.0.weight",
    "lm_head.weight",
)
SUBSETS = [c for n in range(4) for c in itertools.combinations(PARTS, n)]


def test_parts_are_their_names() -> None:
    assert trained_names(NAMES, ()) == frozenset()
    assert trained_names(NAMES, ("language_model",)) == {*NAMES[2:]}
    assert trained_names(NAMES, ("multi_modal_projector",)) == {NAMES[1]}
    assert trained_names(NAMES, ("vision_tower",), tower=("layers.0.weight",)) == {NAMES[0]}
    with pytest.raises(ValueError, match=r"no part named \['projector'\]"):
        trained_names(NAMES, ("projector",))


def test_adapters_and_a_lent_projectors_map_train_alone() -> None:
    adapters = {f"model.language_model.layers.0.lora_{kind}" for kind in "AB"}
    assert trained_names({*NAMES, *adapters}, ("language_model",)) == adapters
    width_map = "model.multi_modal_projector.width_map.weight"
    parts = ("multi_modal_projector", "language_model")
    assert trained_names({*NAMES, width_map}, parts) == {width_map, *NAMES[2:]}
    assert trained_names({*NAMES, width_map}, ("language_model",)) == {*NAMES[2:]}


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("trainable", SUBSETS, ids="+".join)
def test_a_model_says_the_same_by_its_gradients(
    tmp_path: Path, trainable: tuple[str, ...], is_tied: bool
) -> None:
    stock = load_stock(str(make_tiny_llava(tmp_path / "model", tied=is_tied))).stock
    told = trained_of(stock, trainable)
    mllm = MLLM(stock, trainable=trainable)
    named = stock.named_parameters(remove_duplicate=False)
    assert told == {name for name, parameter in named if parameter.requires_grad}
    assert all(p.requires_grad == (part in trainable) for part in PARTS[1:] for p in of(mllm, part))


def of(mllm: MLLM, part: str) -> list[torch.nn.Parameter]:
    return [p for module in mllm.parts([part])[part] for p in module.parameters()]


def test_counting_and_hashing_leave_a_model_as_it_is(stage, student_dir: Path) -> None:
    config = load(stage("run"))
    parts = load_stock(str(student_dir))
    MLLM(parts.stock, trainable=("language_model",))
    before = {name: parameter.requires_grad for name, parameter in parts.stock.named_parameters()}
    ModelSizes.of(parts.stock, config)
    frozen_fingerprints(config, parts, None)
    assert {n: p.requires_grad for n, p in parts.stock.named_parameters()} == before


def test_each_part_is_logged_with_its_own_rate_where_rates_are_set(stage) -> None:
    from test_training_slices import lines

    from llava_kd.cli import main

    config = stage("rates", distilled=False, max_steps=2)
    tree = yaml.safe_load(config.read_text())
    tree["optim"]["lr_by_part"] = {"language_model": tree["optim"]["lr"] / 4}
    config.write_text(yaml.safe_dump(tree))
    assert main(["train", str(config)]) == 0
    for line in lines(config.with_suffix("")):
        assert line["lr/language_model"] == pytest.approx(line["lr"] / 4)
        assert line["lr/multi_modal_projector"] == line["lr"]
