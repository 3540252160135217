"""Taps against stock hidden states, and where a forward is not a plain one.

Shape legend: B rows, T tokens, D width, I images, N tokens of an image, E tower width.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_batches import inputs, record
from torch import Tensor

from llava_kd.batch import Inputs
from llava_kd.models.attention import packed as packed_attention
from llava_kd.models.files.checkpoint import Parts, load_stock
from llava_kd.models.language_model import checkpoint_activations
from llava_kd.models.lora import add_adapters
from llava_kd.models.mllm import MLLM
from llava_kd.models.taps import Tap, Taps, tapped_module

LAYER = Tap("language_model.layers.1")
RECORDS = [record(1), record(2, images=0, prompt=9), record(3, images=2)]


@pytest.fixture
def parts(student_dir: Path) -> Parts:
    return load_stock(str(student_dir))


@pytest.fixture
def model(parts: Parts) -> MLLM:
    return MLLM(parts.stock, trainable=("multi_modal_projector", "language_model"))


def tapped(model: MLLM, batch: Inputs, *taps: Tap) -> dict[Tap, Tensor]:
    with Taps(model.stock, taps).watch() as seen:
        model(batch, model.image_features(batch))
    return dict(seen)


def test_every_layer_is_the_stock_models_hidden_state_bit_for_bit(model: MLLM) -> None:
    batch = inputs(*RECORDS)
    num_layers = len(model.language_model.layers)
    taps = [Tap(f"language_model.layers.{n}", "input") for n in range(num_layers)]
    seen = tapped(model, batch, *taps, Tap("language_model.norm"), Tap("multi_modal_projector"))
    mask_BT = torch.ones_like(batch.input_ids_BT)
    stock = model.stock(
        input_ids=batch.input_ids_BT,
        pixel_values=batch.pixels_ICHW,
        attention_mask=mask_BT,
        output_hidden_states=True,
    )
    for tap, expected_BTD in zip([*taps, Tap("language_model.norm")], stock.hidden_states, strict=True):
        assert torch.equal(seen[tap], expected_BTD), tap
    projected_IND = seen[Tap("multi_modal_projector")]
    assert torch.equal(projected_IND.flatten(0, 1), stock.image_hidden_states)


def test_a_layer_of_the_tower_is_the_stock_towers_hidden_state(model: MLLM) -> None:
    batch = inputs(*RECORDS)
    tower = model.stock.model.vision_tower
    names = [name for name, _ in tower.named_modules() if name.endswith("layers.0")]
    tap = Tap(f"vision_tower.{names[0]}")
    with Taps(model.stock, [tap]).watch() as seen:
        model.image_features(batch)
    hidden = tower(batch.pixels_ICHW, output_hidden_states=True).hidden_states
    assert torch.equal(seen[tap], hidden[1])


def test_packed_records_show_what_they_show_alone(model: MLLM) -> None:
    packed_attention.use(model.language_model, "llava_kd_by_record")
    packed_BTD = tapped(model, inputs(RECORDS), LAYER)[LAYER]
    start = 0
    for item in RECORDS:
        alone_BTD = tapped(model, inputs(item), LAYER)[LAYER]
        end = start + len(item.ids)
        torch.testing.assert_close(packed_BTD[:, start:end], alone_BTD, rtol=1e-5, atol=1e-5)
        start = end


def gradients(model: MLLM, *taps: Tap) -> dict[str, Tensor]:
    """Of a loss on tapped states, left before the backward as the docstring asks."""
    model.zero_grad()
    values = tapped(model, inputs(*RECORDS), *taps)
    torch.stack([value.float().square().mean() for value in values.values()]).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_a_loss_on_states_has_the_same_gradient_under_activation_checkpointing(model: MLLM) -> None:
    taps = [LAYER, Tap("language_model.layers.0.self_attn"), Tap("language_model.layers.1.mlp", "input")]
    plain = gradients(model, *taps)
    assert plain
    checkpoint_activations(model.stock)
    model.train()
    again = gradients(model, *taps)
    assert again.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_adapters_keep_the_paths_and_show_what_they_add(parts: Parts) -> None:
    before = tapped(MLLM(parts.stock), inputs(*RECORDS), Tap("language_model.layers.1.self_attn.q_proj"))
    add_adapters(parts.stock, rank=2, alpha=4.0, dropout=0.0, targets=None, seed=0)
    model = MLLM(parts.stock, trainable=("language_model",))
    path = Tap("language_model.layers.1.self_attn.q_proj")
    assert torch.equal(tapped(model, inputs(*RECORDS), path)[path], before[path])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    assert not torch.equal(tapped(model, inputs(*RECORDS), path)[path], before[path])
    trained = gradients(model, path)
    assert any("lora_A" in name for name in trained)


def test_nothing_stays_on_the_model(model: MLLM) -> None:
    tapped(model, inputs(*RECORDS), LAYER, Tap("language_model.norm", "input"))
    module = tapped_module(model.stock, LAYER)
    with pytest.raises(ValueError, match="did not run"), Taps(model.stock, [LAYER]).watch():
        pass
    assert not module._forward_hooks
    assert not module._forward_pre_hooks


BAD = {
    "language_model.layer.1": "language_model.layers.1",
    "language_model.layers.99": "language_model.layers.",
    "llm.layers.1": "begin with one of vision_tower",
}


@pytest.mark.parametrize(("path", "hint"), BAD.items(), ids=BAD.keys())
def test_a_path_that_is_none_is_refused_with_the_nearest(model: MLLM, path: str, hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        Taps(model.stock, [Tap(path)])


def test_a_tap_is_read_from_text_and_written_back() -> None:
    assert Tap.parse("language_model.layers.3:input") == Tap("language_model.layers.3", "input")
    assert str(Tap.parse("language_model.layers.3")) == "language_model.layers.3"
    with pytest.raises(ValueError, match=":middle"):
        Tap.parse("language_model.layers.3:middle")


def test_two_forwards_in_one_block_are_refused(model: MLLM) -> None:
    batch = inputs(*RECORDS)
    features_INE = model.image_features(batch)
    with Taps(model.stock, [LAYER]).watch():
        model(batch, features_INE)
        with pytest.raises(ValueError, match="ran twice"):
            model(batch, features_INE)
