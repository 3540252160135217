"""The MLLM against the stock model it wraps, and rows that must not see each other.

Shape legend: B rows, T tokens, D width, V vocabulary rows.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_batches import IMAGE_ID, TOKENS, TinyRecord, inputs, record
from tiny_llava import make_tiny_llava
from torch import Tensor

from llava_kd.batch import Inputs
from llava_kd.models.files.checkpoint import Parts, load_stock
from llava_kd.models.mllm import MLLM, Prediction
from llava_kd.models.towers.vision_tower import tokens_per_image


def predict(model: MLLM, batch: Inputs) -> Prediction:
    return model(batch, model.image_features(batch))


def logits_BTV(model: MLLM, batch: Inputs) -> Tensor:
    prediction = predict(model, batch)
    logits = prediction.hidden_BTD @ prediction.head_VD.T
    return logits if prediction.bias_V is None else logits + prediction.bias_V


@pytest.fixture(scope="module")
def parts(student_dir: Path) -> Parts:
    return load_stock(str(student_dir))


@pytest.fixture
def model(parts: Parts) -> MLLM:
    parts.stock.zero_grad()
    return MLLM(parts.stock, trainable=("multi_modal_projector", "language_model"))


RECORDS = {
    "one image": [record(1)],
    "text only": [record(1, images=0)],
    "several images": [record(1, images=3)],
    "mixed lengths": [record(1), record(2, images=0, prompt=9), record(3, images=2), record(4, answer=1)],
}


@pytest.mark.parametrize("records", RECORDS.values(), ids=RECORDS.keys())
@pytest.mark.parametrize("tower", ["siglip-full", "siglip-default", "clip-default", "clip-full"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logits_are_those_of_the_stock_model(
    tmp_path_factory: pytest.TempPathFactory, records: list[TinyRecord], tower: str, tied: bool
) -> None:
    kind, strategy = tower.split("-")
    directory = tmp_path_factory.getbasetemp() / f"stock-{tower}-{tied}"
    if not directory.exists():
        make_tiny_llava(directory, tower=kind, strategy=strategy, tied=tied, layers=1)  # type: ignore[arg-type]
    stock = load_stock(str(directory)).stock.eval()
    tokens = tokens_per_image(stock.config)
    seeds_and_images = [(number, len(item.pixels_ICHW)) for number, item in enumerate(records)]
    batch = inputs(*(record(seed, images=count, tokens=tokens) for seed, count in seeds_and_images))
    with torch.no_grad():
        expected_BTV = stock(
            input_ids=batch.input_ids_BT,
            attention_mask=(batch.segment_ids_BT > 0).long(),
            pixel_values=batch.pixels_ICHW if batch.num_images else None,
        ).logits
        ours_BTV = logits_BTV(MLLM(stock), batch)
    real_BT = batch.segment_ids_BT > 0
    torch.testing.assert_close(ours_BTV[real_BT], expected_BTV[real_BT], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pad_to", [40, 64])
def test_padding_changes_nothing_in_a_record(model: MLLM, pad_to: int) -> None:
    alone = inputs(record(1))
    padded = inputs(record(1), record(2, prompt=12), pad_to=pad_to)
    length = alone.input_ids_BT.shape[1]
    with torch.no_grad():
        expected, got = logits_BTV(model, alone)[0], logits_BTV(model, padded)[0, :length]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "rows",
    [
        [[record(1), record(2)]],
        [[record(1, images=0), record(2, images=2), record(3)], [record(4), record(5, images=0)]],
        [[record(1), record(2)], [record(3)]],
        [[record(6, images=0, prompt=1, answer=1), record(7)]],
    ],
    ids=["two", "two rows", "one row is not packed", "a very short one first"],
)
def test_packed_records_never_see_each_other(model: MLLM, rows: list[list[TinyRecord]]) -> None:
    batch = inputs(*rows, pad_to=120)
    assert batch.is_packed
    with torch.no_grad():
        packed_BTV = logits_BTV(model, batch)
        for b, row in enumerate(rows):
            for number, item in enumerate(row, start=1):
                got = packed_BTV[b][batch.segment_ids_BT[b] == number]
                torch.testing.assert_close(got, logits_BTV(model, inputs(item))[0], rtol=1e-5, atol=1e-5)


def test_a_token_never_sees_a_later_one(model: MLLM) -> None:
    batch = inputs(record(1))
    changed = batch.input_ids_BT.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 256
    with torch.no_grad():
        before = logits_BTV(model, batch)
        after = logits_BTV(model, replace(batch, input_ids_BT=changed))
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])


def test_a_text_only_batch_gives_the_projector_a_zero_gradient(model: MLLM) -> None:
    batch = inputs(record(1, images=0))
    prediction = predict(model, batch)
    assert prediction.projected_IND.shape[0] == 0
    prediction.hidden_BTD.square().sum().backward()
    for parameter in model.multi_modal_projector.parameters():
        assert parameter.grad is not None
        assert not bool(parameter.grad.any())


def test_the_text_embedding_of_the_placeholder_is_never_read(model: MLLM) -> None:
    batch = inputs(record(1))
    other = batch.input_ids_BT.masked_fill(batch.input_ids_BT == IMAGE_ID, 7)
    with torch.no_grad():
        assert torch.equal(
            predict(model, batch).hidden_BTD, predict(model, replace(batch, input_ids_BT=other)).hidden_BTD
        )


def test_placeholders_and_features_must_have_the_same_number(model: MLLM) -> None:
    batch = inputs(record(1))
    short = batch.visual_BT.clone()
    short[0, 1] = False
    with pytest.raises(ValueError, match=f"{TOKENS - 1} visual positions but .* gave {TOKENS} features"):
        predict(model, replace(batch, visual_BT=short))


@pytest.mark.parametrize(
    "trainable",
    [
        (),
        ("multi_modal_projector",),
        ("multi_modal_projector", "language_model"),
        ("vision_tower", "multi_modal_projector"),
        ("language_model",),
    ],
    ids=str,
)
def test_gradients_reach_the_trained_parts_and_no_other(parts: Parts, trainable: tuple[str, ...]) -> None:
    parts.stock.zero_grad()
    model = MLLM(parts.stock, trainable=trainable)
    assert ("vision_tower" in dict(model.named_children())) == ("vision_tower" in trainable)
    loss = logits_BTV(model, inputs(record(1))).square().mean()
    if trainable:
        loss.backward()
    for name, modules in model.parts().items():
        weights = [p for module in modules for p in module.parameters()]
        has_gradient = [p.grad is not None and bool(p.grad.any()) for p in weights]
        assert any(has_gradient) == (name in trainable), name
        wants = [p.requires_grad for p in weights]
        assert any(wants) == (name in trainable)
        assert name == "vision_tower" or all(wants) == any(wants)  # of a tower, what its features come from


def test_an_unknown_part_is_refused_with_the_known_ones(parts: Parts) -> None:
    with pytest.raises(ValueError, match=r"no part named \['projector'\]; a model has \['vision_tower'"):
        MLLM(parts.stock, trainable=("projector",))
