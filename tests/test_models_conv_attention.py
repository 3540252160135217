"""The connector over a grid: what it computes, its size, what it refuses, and how it comes back from disk.

Shape legend: I images, N tokens of an image, E tower width, W inner width, R and C rows and columns of the
grid, B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_batches import inputs, record
from tiny_llava import make_tiny_llava
from tiny_towers import make_language_model, make_tower
from torch import Tensor
from transformers import AutoModelForImageTextToText, SiglipVisionConfig

from llava_kd.assembly.parts.models import student_parts
from llava_kd.config import StudentConfig
from llava_kd.evaluation.generation.generate import Generator
from llava_kd.evaluation.generation.model_directory import model_directory
from llava_kd.models.files.checkpoint import Parts, load_stock, save_stock
from llava_kd.models.files.export import check_stock, export
from llava_kd.models.mllm import MLLM
from llava_kd.models.projectors.conv_attention import (
    ConvAttention,
    ConvAttentionConfig,
    ConvAttentionLlava,
    sizes,
)
from llava_kd.models.projectors.from_teacher import with_teacher_projector
from llava_kd.models.projectors.on_a_grid import with_conv_attention
from llava_kd.models.taps import tapped_widths


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("own") / "m", hidden=48)


def student(own: Path, *, seed: int = 3) -> Parts:
    return with_conv_attention(load_stock(str(own)), seed=seed)


def stirred(connector: Any) -> Any:
    """With values and gates that do something; a new one has neither."""
    generator = torch.Generator().manual_seed(5)
    for parameter in connector.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    return connector


def connector_of(rows: int, columns: int, width: int = 8, gate: int = 3) -> ConvAttention:
    tower = SiglipVisionConfig(hidden_size=5, num_hidden_layers=1, num_attention_heads=1)
    text = {"model_type": "qwen2", "hidden_size": 6, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = ConvAttentionConfig(
        vision_config=tower,
        text_config=text,
        projector_width=width,
        projector_gate_width=gate,
        projector_rows=rows,
        projector_columns=columns,
    )
    return stirred(ConvAttention(config))


def logits_BTV(stock: Any) -> Tensor:
    batch = inputs(record(1), record(2, images=2))
    with torch.no_grad():
        return stock.eval()(input_ids=batch.input_ids_BT, pixel_values=batch.pixels_ICHW).logits


def convolved(state_NW: list[list[float]], weight: Tensor, rows: int, columns: int) -> list[list[float]]:
    """Each channel by itself over the grid, zeros around it; places row by row."""
    found = []
    for r in range(rows):
        for c in range(columns):
            place = []
            for w in range(len(state_NW[0])):
                total = 0.0
                for down in (-1, 0, 1):
                    for right in (-1, 0, 1):
                        if 0 <= r + down < rows and 0 <= c + right < columns:
                            value = state_NW[(r + down) * columns + c + right][w]
                            total += float(weight[w, 0, down + 1, right + 1]) * value
                place.append(total)
            found.append(place)
    return found


def attended(query: list, key: list, value: list, heads: int) -> list[list[float]]:
    width = len(query[0]) // heads
    found = [[0.0] * len(query[0]) for _ in query]
    for h in range(heads):
        span = range(h * width, (h + 1) * width)
        for n, asking in enumerate(query):
            scores = [sum(asking[w] * other[w] for w in span) / math.sqrt(width) for other in key]
            weights = [math.exp(s - max(scores)) for s in scores]
            for w in span:
                found[n][w] = sum(a * v[w] for a, v in zip(weights, value, strict=True)) / sum(weights)
    return found


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def by_hand(connector: ConvAttention, features_NE: Tensor, rows: int, columns: int) -> Tensor:
    """Of one image, number by number."""
    first_NW = torch.nn.functional.gelu(connector.linear_1(features_NE))
    normed = connector.norm(first_NW).tolist()
    asked = [
        convolved(normed, layer.weight, rows, columns)
        for layer in (connector.query, connector.key, connector.value)
    ]
    mixed = attended(*asked, heads=4)
    inner = [
        [a + b for a, b in zip(x, y, strict=True)] for x, y in zip(first_NW.tolist(), mixed, strict=True)
    ]
    told = [[sum(place) / len(place), max(place)] for place in inner]
    weight, bias = connector.place_gate.weight, float(connector.place_gate.bias[0])
    place_gates = []
    for r in range(rows):
        for c in range(columns):
            total = bias
            for k in range(2):
                for down in (-1, 0, 1):
                    for right in (-1, 0, 1):
                        if 0 <= r + down < rows and 0 <= c + right < columns:
                            value = told[(r + down) * columns + c + right][k]
                            total += float(weight[0, k, down + 1, right + 1]) * value
            place_gates.append(sigmoid(total))
    means = torch.tensor([sum(place[w] for place in inner) / len(inner) for w in range(len(inner[0]))])
    first, second = connector.channel_gate[0], connector.channel_gate[2]
    channels = [sigmoid(x) for x in second(torch.nn.functional.gelu(first(means))).tolist()]
    gated = [
        [x * (p + c) for x, c in zip(place, channels, strict=True)]
        for place, p in zip(inner, place_gates, strict=True)
    ]
    return connector.linear_2(torch.tensor(gated))


@torch.no_grad()
@pytest.mark.parametrize(("rows", "columns"), [(3, 3), (2, 4), (4, 2)])
def test_it_is_convolution_attention_and_gates_by_hand(rows: int, columns: int) -> None:
    connector = connector_of(rows, columns)
    features_INE = torch.randn(2, rows * columns, 5, generator=torch.Generator().manual_seed(1))
    found_IND = connector(features_INE)
    for features_NE, found_ND in zip(features_INE, found_IND, strict=True):
        expected = by_hand(connector, features_NE, rows, columns)
        torch.testing.assert_close(found_ND, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_rows_and_columns_are_not_exchanged() -> None:
    wide, tall = connector_of(2, 4), connector_of(4, 2)
    features_INE = torch.randn(1, 8, 5, generator=torch.Generator().manual_seed(1))
    assert not torch.allclose(wide(features_INE), tall(features_INE), atol=1e-3)


@torch.no_grad()
def test_another_order_of_the_images_gives_the_same_rows() -> None:
    connector = connector_of(3, 3)
    features_INE = torch.randn(4, 9, 5, generator=torch.Generator().manual_seed(2))
    order = torch.tensor([2, 0, 3, 1])
    whole_IND = connector(features_INE)
    torch.testing.assert_close(connector(features_INE[order]), whole_IND[order], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(connector(features_INE[1:2]), whole_IND[1:2], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_it_begins_as_its_two_layers_alone(own: Path) -> None:
    parts = student(own)
    connector = parts.stock.model.multi_modal_projector
    features_INE = torch.randn(2, 16, 32)
    expected = connector.linear_2(torch.nn.functional.gelu(connector.linear_1(features_INE)))
    torch.testing.assert_close(connector(features_INE), expected)
    again, other = (student(own, seed=seed).stock.model.multi_modal_projector for seed in (3, 4))
    assert torch.equal(connector.linear_1.weight, again.linear_1.weight)
    assert not torch.equal(connector.query.weight, other.query.weight)


def test_every_weight_of_a_new_one_is_soon_trained(own: Path) -> None:
    """Values begin at zero, and so does what reaches queries and keys; a step later all move."""
    connector = student(own).stock.model.multi_modal_projector
    optimiser = torch.optim.AdamW(connector.parameters(), lr=1e-3, weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in connector.named_parameters()}
    features_INE = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        optimiser.zero_grad()
        connector(features_INE).square().sum().backward()
        optimiser.step()
    assert all(not torch.equal(before[name], p) for name, p in connector.named_parameters())


@pytest.mark.parametrize(("tower", "language"), [(1152, 896), (1152, 1536), (32, 48), (768, 2048), (16, 16)])
def test_it_is_as_large_as_the_two_layers_of_stock(tower: int, language: int) -> None:
    found = sizes(tower, language)
    stock = tower * language + language + language * language + language
    assert 0 <= stock - found.parameters < 2 * found.width + 1
    assert found.width % 4 == 0
    if tower >= 768:
        assert (stock - found.parameters) / stock < 0.002


def test_the_model_has_as_many_parameters_as_is_said(own: Path) -> None:
    counts = [
        sum(p.numel() for p in parts.stock.model.multi_modal_projector.parameters())
        for parts in (student(own), load_stock(str(own)))
    ]
    assert counts[0] == sizes(32, 48).parameters
    assert 0 <= counts[1] - counts[0] < 80


def test_models_too_narrow_for_it_are_refused() -> None:
    with pytest.raises(ValueError, match=r"leave 16 parameters, fewer than .*; set projector to own"):
        sizes(4, 2)


@pytest.mark.parametrize(
    ("tower", "strategy", "message"),
    [
        ("siglip", "default", r"15 visual tokens .* less the first\); set .*strategy to full"),
        ("clip", "full", r"1 prefix and 4 x 4\); set .*strategy to default"),
        ("dinov2-registers", "default", "4 prefix and .*; take a tower without registers"),
    ],
)
def test_a_strategy_that_leaves_no_whole_grid_is_refused(
    tmp_path: Path, tower: str, strategy: Any, message: str
) -> None:
    text = make_language_model("qwen2", tmp_path / "text")
    config = StudentConfig(
        vision_tower=make_tower(tower, tmp_path / "tower"),
        language_model=str(text),
        vision_feature_select_strategy=strategy,
        projector="conv_attention",
    )
    with pytest.raises(ValueError, match=f"conv_attention` needs a whole grid .*{message}"):
        student_parts(config, template="chatml", seed=0)


@pytest.mark.parametrize(("tower", "strategy"), [("clip", "default"), ("timm-convnext", "full")])
def test_towers_with_a_class_token_or_of_maps_have_a_grid(tmp_path: Path, tower: str, strategy: Any) -> None:
    text = make_language_model("qwen2", tmp_path / "text")
    config = StudentConfig(
        vision_tower=make_tower(tower, tmp_path / "tower"),
        language_model=str(text),
        vision_feature_select_strategy=strategy,
        projector="conv_attention",
    )
    parts = student_parts(config, template="chatml", seed=0)
    own = parts.stock.config
    assert own.projector_rows * own.projector_columns == parts.tokens_per_image
    if tower == "timm-convnext":
        both = (
            r"conv_attention and the tower timm:.*import llava_kd\.models\.projectors\.conv_attention, llava"
        )
        with pytest.raises(ValueError, match=both):
            check_stock(parts, "it")


def test_an_oblong_grid_is_kept(tmp_path: Path) -> None:
    """DINOv2 takes images of any size: 32 x 64 pixels are 4 x 8 places."""
    tower = Path(make_tower("dinov2", tmp_path / "tower"))
    path = tower / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    settings |= {"size": {"height": 32, "width": 64}, "do_center_crop": False}
    path.write_text(json.dumps(settings))
    text = make_language_model("qwen2", tmp_path / "text")
    config = StudentConfig(
        vision_tower=str(tower),
        language_model=str(text),
        vision_feature_select_strategy="default",
        projector="conv_attention",
    )
    parts = student_parts(config, template="chatml", seed=0)
    assert parts.stock.model.multi_modal_projector.grid == (4, 8)


def test_tokens_of_another_grid_are_refused_where_they_come(own: Path) -> None:
    with pytest.raises(ValueError, match="reads 4 x 4 = 16 visual tokens an image; got 15"):
        student(own).stock.model.multi_modal_projector(torch.zeros(1, 15, 32))


def test_a_batch_without_images_touches_every_weight(own: Path) -> None:
    mllm = MLLM(student(own).stock, trainable=("multi_modal_projector",))
    batch = inputs(record(1, images=0))
    mllm(batch, mllm.image_features(batch)).hidden_BTD.sum().backward()
    for name, parameter in mllm.multi_modal_projector.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_its_taps_have_widths(own: Path) -> None:
    taps = ["multi_modal_projector", "multi_modal_projector.linear_2:input"]
    found = tapped_widths(student(own).stock, taps)
    assert found == dict(zip(taps, (48, sizes(32, 48).width), strict=True))


def test_it_comes_back_from_disk_and_answers(tmp_path: Path, own: Path) -> None:
    parts = student(own)
    stirred(parts.stock.model.multi_modal_projector)
    save_stock(parts, tmp_path / "model")
    back = load_stock(str(tmp_path / "model"))
    assert isinstance(back.stock, ConvAttentionLlava)
    assert torch.equal(logits_BTV(back.stock), logits_BTV(parts.stock))
    assert not torch.equal(logits_BTV(back.stock), logits_BTV(load_stock(str(own)).stock))
    auto = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert torch.equal(logits_BTV(auto), logits_BTV(parts.stock))
    assert model_directory(tmp_path / "model") == tmp_path / "model"
    loaded = Generator.load(tmp_path / "model", device=torch.device("cpu")).model
    assert torch.equal(logits_BTV(loaded), logits_BTV(parts.stock))


def test_stock_loaders_refuse_it_and_draw_nothing(tmp_path: Path, own: Path) -> None:
    """transformers alone, in another process: the auto class does not know it, LLaVA's has other shapes."""
    save_stock(student(own), tmp_path / "model")
    code = """
import sys, transformers
kind = getattr(transformers, sys.argv[1])
kind.from_pretrained(sys.argv[2])
print("loaded")
"""
    said = {}
    for kind in ("AutoModelForImageTextToText", "LlavaForConditionalGeneration"):
        words = [sys.executable, "-c", code, kind, str(tmp_path / "model")]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode != 0, done.stdout
        assert "loaded" not in done.stdout
        said[kind] = done.stderr
    assert "llava_kd_conv_attention" in said["AutoModelForImageTextToText"]
    assert "`ignore_mismatched_sizes` to `False`" in said["LlavaForConditionalGeneration"]


def test_export_names_what_would_make_it_loadable(tmp_path: Path, own: Path) -> None:
    save_stock(student(own), tmp_path / "model")
    with pytest.raises(
        ValueError, match=r"conv_attention, for which stock LLaVA has no class.*import llava_kd\.models\.pro"
    ):
        export(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_lacks_a_weight_or_fits_no_more_is_refused(tmp_path: Path, own: Path) -> None:
    parts = student(own)
    directory = tmp_path / "model"
    save_stock(parts, directory)
    config = directory / "config.json"
    whole = config.read_text()
    for name, value, message in (
        ("projector_rows", 2, r"connector for 8 visual tokens .*tower and processor give 16"),
        ("projector_width", 24, r"parts of .* do not fit together: .*projector"),
    ):
        config.write_text(json.dumps(json.loads(whole) | {name: value}))
        with pytest.raises(ValueError, match=message):
            load_stock(str(directory))
    config.write_text(whole)
    weights = directory / "model.safetensors"
    state = load_file(weights)
    del state["model.multi_modal_projector.query.weight"]
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of a ConvAttentionLlava: .*query\.weight"):
        load_stock(str(directory))


def test_a_teachers_own_is_not_lent(own: Path) -> None:
    with pytest.raises(ValueError, match="teacher's is conv_attention, which cannot be reused"):
        with_teacher_projector(load_stock(str(own)), student(own), seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpoint": "somewhere"}, "keeps its projector"),
        (
            {"vision_tower": "a/b", "language_model": "c/d", "projector_start": "closed_form"},
            "conv_attention is no linear map",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StudentConfig(projector="conv_attention", **settings)


@torch.no_grad()
@pytest.mark.parametrize("is_autocast", [True, False], ids=["autocast", "in bf16"])
def test_it_computes_in_bf16(own: Path, is_autocast: bool) -> None:
    connector = stirred(student(own).stock.model.multi_modal_projector)
    features_INE = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))
    expected = connector(features_INE)
    if is_autocast:
        with torch.autocast("cpu", torch.bfloat16):
            found = connector(features_INE)
    else:
        found = connector.bfloat16()(features_INE.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.05 * float(expected.abs().max()))
