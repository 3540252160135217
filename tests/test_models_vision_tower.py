"""Tower features as stock LLaVA selects them, their number, and the fingerprint of a tower."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
from tiny_llava import make_tiny_llava
from transformers import LlavaConfig
from transformers.image_processing_utils import BaseImageProcessor

from llava_kd.models.files.checkpoint import Parts, load_stock
from llava_kd.models.towers.loading import load_tower
from llava_kd.models.towers.vision_tower import (
    feature_layer,
    image_features,
    tokens_per_image,
    tower_fingerprint,
)

TOWER = Path(__file__).parents[1] / "scripts" / "quickstart" / "backbones" / "vision_tower"
CASES: list[tuple[Literal["siglip", "clip"], Literal["full", "default"], int]] = [
    ("siglip", "full", 16),
    ("siglip", "default", 15),
    ("clip", "default", 16),
    ("clip", "full", 17),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Parts, int]:
    tower, strategy, tokens = request.param
    directory = tmp_path_factory.mktemp("tower") / "model"
    return load_stock(str(make_tiny_llava(directory, tower=tower, strategy=strategy))), tokens


def test_features_are_those_that_stock_llava_feeds_its_projector(case: tuple[Parts, int]) -> None:
    parts, tokens = case
    stock = parts.stock.eval()
    seen = []
    handle = stock.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    pixels_ICHW = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        stock.model.get_image_features(pixel_values=pixels_ICHW)
        features_INE = image_features(
            stock.model.vision_tower,
            pixels_ICHW,
            layer=feature_layer(stock.config),
            strategy=stock.config.vision_feature_select_strategy,
        )
    handle.remove()
    torch.testing.assert_close(features_INE, seen[0], rtol=0, atol=0)
    assert features_INE.shape[1] == tokens == tokens_per_image(stock.config)


def test_the_processor_writes_as_many_placeholders_as_there_are_features(case: tuple[Parts, int]) -> None:
    parts, tokens = case
    image = torch.zeros(3, 40, 50, dtype=torch.uint8)
    encoded = parts.processor(images=[image], text="<image> x", return_tensors="pt")
    assert int((encoded["input_ids"] == parts.stock.config.image_token_id).sum()) == tokens


def test_several_feature_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"vision_feature_layer must be one layer"):
        feature_layer(LlavaConfig(vision_feature_layer=[-2, -5]))


def test_a_tower_of_another_family_is_refused() -> None:
    config = LlavaConfig(vision_config={"model_type": "pixtral"}, text_config={"model_type": "qwen2"})
    with pytest.raises(ValueError, match=r"vision_tower must be one of .*siglip.*'pixtral'"):
        tokens_per_image(config)


@dataclass
class Print:
    """Everything that a fingerprint is taken of."""

    parts: Parts
    dtype: torch.dtype = torch.float32

    @property
    def tower(self) -> torch.nn.Module:
        return self.parts.stock.model.vision_tower

    @property
    def images(self) -> BaseImageProcessor:
        return self.parts.processor.image_processor

    def take(self) -> str:
        return tower_fingerprint(self.tower, self.parts.stock.config, self.images.to_dict(), dtype=self.dtype)


def change_one_weight(it: Print) -> None:
    with torch.no_grad():
        next(reversed(list(it.tower.parameters()))).view(-1)[-1] += 1e-3


def change_mean(it: Print) -> None:
    it.images.image_mean = [0.5, 0.5, 0.4]


def change_size(it: Print) -> None:
    it.images.size = {"height": 48, "width": 48}


def change_resample(it: Print) -> None:
    it.images.resample = 2


def change_layer(it: Print) -> None:
    it.parts.stock.config.vision_feature_layer = -1


def change_strategy(it: Print) -> None:
    it.parts.stock.config.vision_feature_select_strategy = "default"


def change_dtype(it: Print) -> None:
    it.dtype = torch.bfloat16


def setting(name: str, value: object) -> Callable[[Print], None]:
    """A change of the tower's configuration that leaves every weight as it is."""

    def change(it: Print) -> None:
        setattr(it.parts.stock.config.vision_config, name, value)

    change.__name__ = name
    return change


CHANGES = [
    setting("hidden_act", "relu"),
    setting("num_attention_heads", 4),
    setting("layer_norm_eps", 1e-3),
    *(change_one_weight, change_mean, change_size, change_resample, change_layer, change_strategy),
    change_dtype,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_fingerprint_differs_when_anything_that_makes_features_does(
    student_dir: Path, change: Callable[[Print], None]
) -> None:
    it = Print(load_stock(str(student_dir)))
    before = it.take()
    change(it)
    assert it.take() != before


def test_two_models_with_the_same_tower_have_the_same_fingerprint(student_dir: Path, tmp_path: Path) -> None:
    """The teacher may be wider and in another type on disk: only the tower counts, as it is computed."""
    other = load_stock(str(make_tiny_llava(tmp_path / "m", hidden=64, layers=1)), dtype=torch.bfloat16)
    student = Print(load_stock(str(student_dir)), torch.bfloat16)
    assert Print(other, torch.bfloat16).take() == student.take()
    assert Print(other, torch.float32).take() != Print(student.parts, torch.float32).take()


@pytest.mark.parametrize(
    ("name", "value"), [("attention_dropout", 0.1), ("initializer_range", 1.0), ("of_another_tool", 3)]
)
def test_settings_that_change_no_feature_do_not_count(student_dir: Path, name: str, value: object) -> None:
    it = Print(load_stock(str(student_dir)))
    before = it.take()
    setting(name, value)(it)
    assert it.take() == before


def test_weights_below_the_computing_precision_do_not_count(student_dir: Path) -> None:
    it = Print(load_stock(str(student_dir)), torch.bfloat16)
    before = it.take()
    with torch.no_grad():
        weight = next(p for p in it.tower.parameters() if p.dim() > 1)
        weight.copy_(weight.bfloat16().float())
    assert it.take() == before


def test_a_tower_without_its_image_processor_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tower").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(TOWER / name, tmp_path / "tower")
    with pytest.raises(
        ValueError, match=r"tower must hold preprocessor_config.json, .* it is not there: copy it"
    ):
        load_tower(str(tmp_path / "tower"), feature_layer=-2, dtype=torch.float32)
