"""Every family of towers: its tokens are the library's own, and a LLaVA around it says how many there are.

Shape legend: I images, C channels, H height, W width, N tokens, E width.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_towers_docs import TABLE
from tiny_towers import EXPECTED, PATCH, TOWERS, make_language_model, make_tower
from torch import Tensor
from transformers import AutoModel, LlavaForConditionalGeneration

from llava_kd.models.files.checkpoint import Parts, compose, load_stock, save_stock
from llava_kd.models.tower_source import tower_source
from llava_kd.models.towers.adapted import AdaptedTower, tokens_of
from llava_kd.models.towers.families import FAMILIES
from llava_kd.models.towers.loading import LoadedTower, load_tower
from llava_kd.models.towers.vision_tower import feature_layer, image_features, input_size, num_prefix_tokens


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_language_model("qwen2", tmp_path_factory.mktemp("llm") / "qwen2")


@pytest.fixture(scope="module", params=list(TOWERS))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def line(family: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tower(family, tmp_path_factory.mktemp("tower") / family)


@pytest.fixture(scope="module")
def loaded(line: str) -> LoadedTower:
    return load_tower(line, feature_layer=-2, dtype=torch.float32, seed=3)


@pytest.fixture(scope="module")
def parts(line: str, language_model: Path) -> Parts:
    return compose(vision_tower=line, language_model=str(language_model), seed=3)


def noise(loaded: LoadedTower) -> Tensor:
    height, width = input_size(loaded.image_processor)
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def own_tokens(line: str, pixels_ICHW: Tensor) -> Tensor:
    """Tokens of layer -2 by the library alone, made by its own functions from the same files or seed."""
    source = tower_source(line)
    options = source.constructor_options()
    torch.manual_seed(3)
    if source.library == "timm":
        import timm

        if "convnext" not in line:
            options["img_size"] = source.image_size
        module = timm.create_model(source.name, num_classes=0, **options).eval()
        state = module.forward_intermediates(pixels_ICHW, indices=[-2], norm=False, intermediates_only=True)
        if not module.__dict__.get("num_prefix_tokens"):
            return tokens_of(state[0])
        pairs = module.forward_intermediates(
            pixels_ICHW, indices=[-2], norm=False, intermediates_only=True, return_prefix_tokens=True
        )
        return torch.cat([pairs[0][1], tokens_of(pairs[0][0])], dim=1)
    if source.library == "open_clip":
        import open_clip

        visual = open_clip.create_model(f"local-dir:{source.name}").visual.eval()
        extra = {} if "resnet" in line else {"output_extra_tokens": True}
        output = visual.forward_intermediates(pixels_ICHW, indices=[-2], intermediates_only=True, **extra)
        tokens_INE = tokens_of(output["image_intermediates"][0])
        prefix = output.get("image_intermediates_prefix")
        return tokens_INE if prefix is None else torch.cat([prefix[0], tokens_INE], dim=1)
    model = AutoModel.from_pretrained(source.name).eval()
    return tokens_of(model(pixels_ICHW, output_hidden_states=True).hidden_states[-2])


def test_tokens_are_those_of_the_library(family: str, line: str, loaded: LoadedTower) -> None:
    pixels_ICHW = noise(loaded)
    with torch.no_grad():
        ours_INE = loaded.model(pixels_ICHW, output_hidden_states=True).hidden_states[-2]
    assert tuple(ours_INE.shape[1:]) == EXPECTED[family]
    torch.testing.assert_close(ours_INE, own_tokens(line, pixels_ICHW), rtol=1e-5, atol=1e-5)


def test_only_what_no_stock_class_expresses_is_adapted(family: str, loaded: LoadedTower) -> None:
    assert isinstance(loaded.model, AdaptedTower) != TOWERS[family][1]


def test_the_page_says_which_row_of_the_table_describes_it(family: str, loaded: LoadedTower) -> None:
    model_type = loaded.model.config.model_type
    assert TABLE[family][3] == model_type
    assert FAMILIES[model_type].is_stock == TOWERS[family][1]


def test_the_composed_llava_counts_its_tokens(family: str, parts: Parts) -> None:
    assert parts.tokens_per_image == EXPECTED[family][0]
    image = torch.zeros(3, 40, 50, dtype=torch.uint8)
    ids = parts.processor(images=[image], text="<image> x", return_tensors="pt")["input_ids"]
    assert int((ids == parts.stock.config.image_token_id).sum()) == EXPECTED[family][0]


def test_features_are_those_that_the_projector_of_stock_llava_reads(
    parts: Parts, loaded: LoadedTower
) -> None:
    seen = []
    hook = parts.stock.model.multi_modal_projector.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    pixels_ICHW = noise(loaded)
    with torch.no_grad():
        parts.stock.model.get_image_features(pixel_values=pixels_ICHW)
        features_INE = image_features(
            parts.stock.model.vision_tower,
            pixels_ICHW,
            layer=feature_layer(parts.stock.config),
            strategy="full",
        )
    hook.remove()
    torch.testing.assert_close(features_INE, seen[0], rtol=0, atol=0)


def test_a_saved_student_comes_back_with_equal_logits(parts: Parts, tmp_path: Path) -> None:
    save_stock(parts, tmp_path / "student")
    again = load_stock(str(tmp_path / "student"))
    alone = LlavaForConditionalGeneration.from_pretrained(tmp_path / "student")
    image = torch.randint(0, 255, (3, 40, 50), dtype=torch.uint8)
    inputs = parts.processor(images=[image], text="<image> what?", return_tensors="pt")
    with torch.no_grad():
        logits = [model.eval()(**inputs).logits for model in (parts.stock, again.stock, alone)]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=0)
    torch.testing.assert_close(logits[0], logits[2], rtol=0, atol=0)
    assert again.tokens_per_image == parts.tokens_per_image


def test_the_first_prefix_token_is_dropped_by_strategy_default(
    family: str, line: str, language_model: Path
) -> None:
    parts = compose(
        vision_tower=line, language_model=str(language_model), vision_feature_select_strategy="default"
    )
    assert parts.tokens_per_image == EXPECTED[family][0] - 1
    assert num_prefix_tokens(parts.stock.config) in (0, 1, 2, 5)


def test_a_map_becomes_tokens_row_by_row() -> None:
    map_IEHW = torch.arange(6.0).view(1, 1, 2, 3)
    assert tokens_of(map_IEHW)[0, :, 0].tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match=r"a map or a row of tokens.*\(2, 7\)"):
        tokens_of(torch.zeros(2, 7))


def test_dinov2_reads_pictures_of_another_size_than_its_own(tmp_path: Path, language_model: Path) -> None:
    line = make_tower("dinov2", tmp_path / "tower")
    parts = compose(vision_tower=f"{line}?image_size=48", language_model=str(language_model))
    assert parts.tokens_per_image == 1 + (48 // PATCH) ** 2
    with pytest.raises(ValueError, match=r"multiples of its patch size 8.*44 x 44"):
        compose(vision_tower=f"{line}?image_size=44", language_model=str(language_model))


def test_a_size_that_a_tower_cannot_take_is_refused(tmp_path: Path, language_model: Path) -> None:
    siglip = make_tower("siglip", tmp_path / "siglip")
    with pytest.raises(ValueError, match=r"takes images of 32 x 32 pixels.*gives 48 x 48"):
        compose(vision_tower=f"{siglip}?image_size=48", language_model=str(language_model))
    open_clip = make_tower("open-clip", tmp_path / "open-clip")
    with pytest.raises(ValueError, match=r"takes 32 x 32 pixels; got 40"):
        load_tower(f"{open_clip}?image_size=40", feature_layer=-2, dtype=torch.float32)


def test_unknown_names_come_with_the_nearest(tmp_path: Path) -> None:
    siglip = Path(make_tower("siglip", tmp_path / "siglip"))
    for line, message in (
        (
            "timm:vit_base_patch16_siglip_225",
            r"timm has no model .*did you mean .*vit_base_patch16_siglip_224",
        ),
        ("open_clip:ViT-B-17", r"open_clip has no model 'ViT-B-17' \(did you mean .*ViT-B-16"),
        ("tim:resnet18", r"no library 'tim' \(did you mean timm"),
        (str(siglip.with_name("sigllip")), r"does not exist \(did you mean siglip\?\)"),
        ("open_clip:ViT-B-16", r"add \?pretrained=TAG"),
        ("timm:resnet18?depth", r"options look like \?pretrained=false"),
        ("timm:", "no name"),
        (
            "open_clip:ViT-B-32?pretrained=laion2b",
            r"no weights 'laion2b' \(did you mean .*its tags are openai",
        ),
        ("timm:resnet18?pretrained=fals", "pretrained must be true or false; got 'fals'"),
        (f"{siglip}?depth=2", "takes the options pretrained and image_size; got depth"),
    ):
        with pytest.raises(ValueError, match=message):
            load_tower(line, feature_layer=-2, dtype=torch.float32)


def test_towers_that_read_no_fixed_picture_or_give_no_patches_are_refused(tmp_path: Path) -> None:
    (tmp_path / "naflex").mkdir()
    (tmp_path / "naflex" / "config.json").write_text(json.dumps({"model_type": "siglip2_vision_model"}))
    with pytest.raises(ValueError, match="patches and their places"):
        load_tower(str(tmp_path / "naflex"), feature_layer=-2, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"no square grid of patches"):
        load_tower(
            "timm:convnext_tiny?pretrained=false&dims=[8,8,8,8]&depths=[1,1,1,1]&image_size=32",
            feature_layer=-1,
            dtype=torch.float32,
        )
    with pytest.raises(ValueError, match=r"must be from -4 to -1; got -9"):
        load_tower(
            "timm:convnext_tiny?pretrained=false&dims=[8,8,8,8]&depths=[1,1,1,1]",
            feature_layer=-9,
            dtype=torch.float32,
        )


@pytest.mark.parametrize("word", ["img_size", "image_size"])
def test_the_size_that_a_timm_tower_is_asked_for_is_the_one_it_reads(word: str) -> None:
    """Either word reaches timm: 2 x 2 patches of 16 pixels, where its own size of 224 has 14 x 14."""
    options = "pretrained=false&depth=1&embed_dim=24&num_heads=2"
    loaded = load_tower(
        f"timm:vit_tiny_patch16_224?{options}&{word}=32", feature_layer=-1, dtype=torch.float32
    )
    assert input_size(loaded.image_processor) == (32, 32)
    tokens_INE = loaded.model(pixel_values=torch.zeros(1, 3, 32, 32)).last_hidden_state
    assert tokens_INE.shape == (1, 1 + 4, 24)
    with pytest.raises(ValueError, match="has two sizes"):
        load_tower(
            f"timm:vit_tiny_patch16_224?{options}&img_size=32&image_size=48",
            feature_layer=-1,
            dtype=torch.float32,
        )
