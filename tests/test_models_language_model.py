"""Language models inside a stock LLaVA: equal logits, no row moved, or refused with the reason.

Shape legend: B rows, T tokens, D width, V vocabulary rows.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llava import IMAGE_TOKEN
from tiny_towers import LANGUAGE_MODELS, make_language_model, make_tower
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

from llava_kd.batch import Inputs
from llava_kd.models.files.checkpoint import Parts, compose, load_stock, save_stock
from llava_kd.models.language_model import load_language_model
from llava_kd.models.mllm import MLLM


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tower("siglip", tmp_path_factory.mktemp("tower") / "siglip")


@pytest.fixture(scope="module", params=list(LANGUAGE_MODELS))
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_language_model(request.param, tmp_path_factory.mktemp("llm") / request.param)


@pytest.fixture(scope="module")
def parts(directory: Path, tower: str) -> Parts:
    return compose(vision_tower=tower, language_model=str(directory))


def text_inputs(ids_BT: torch.Tensor) -> Inputs:
    zeros_BT = torch.zeros_like(ids_BT)
    return Inputs(
        input_ids_BT=ids_BT,
        labels_BT=ids_BT,
        position_ids_BT=torch.arange(ids_BT.shape[1]).expand_as(ids_BT),
        segment_ids_BT=zeros_BT + 1,
        visual_BT=zeros_BT.bool(),
        pixels_ICHW=torch.zeros(0, 3, 32, 32),
        image_is_valid_I=torch.zeros(0, dtype=torch.bool),
    )


def our_logits(parts: Parts, inputs: Inputs, features_INE: torch.Tensor) -> torch.Tensor:
    prediction = MLLM(parts.stock).eval()(inputs, features_INE)
    assert prediction.bias_V is None
    return prediction.hidden_BTD @ prediction.head_VD.T


@torch.no_grad()
def test_a_head_of_its_own_stays_where_the_config_says_that_it_is_tied(tower: str, tmp_path: Path) -> None:
    """As training that saves the head apart leaves it, with adapters on it for one."""
    directory = make_language_model("qwen2", tmp_path / "llm")
    state = load_file(directory / "model.safetensors")
    state["lm_head.weight"] = torch.randn_like(state["model.embed_tokens.weight"])
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    parts = compose(vision_tower=tower, language_model=str(directory))
    rows = len(state["lm_head.weight"])
    for found in (parts, None):
        if found is None:
            save_stock(parts, tmp_path / "saved")
            found = load_stock(str(tmp_path / "saved"))
        assert torch.equal(found.head.weight[:rows], state["lm_head.weight"])
        embedding = found.stock.get_input_embeddings().weight
        assert torch.equal(embedding[:rows], state["model.embed_tokens.weight"])
    again = load_file(tmp_path / "saved/model.safetensors")  # a student that is continued
    config = tmp_path / "saved/config.json"
    config.write_text(
        config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true')
    )
    save_stock(load_stock(str(tmp_path / "saved")), tmp_path / "twice")
    assert torch.equal(load_stock(str(tmp_path / "twice")).head.weight[:rows], state["lm_head.weight"])
    assert set(load_file(tmp_path / "twice/model.safetensors")) == set(again)


@torch.no_grad()
def test_text_gets_the_logits_of_the_language_model_alone(directory: Path, parts: Parts) -> None:
    ids_BT = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))
    alone = AutoModelForCausalLM.from_pretrained(directory).eval()
    ours_BTV = our_logits(parts, text_inputs(ids_BT), torch.zeros(0, 1, 32))
    expected_BTV = alone(input_ids=ids_BT).logits
    torch.testing.assert_close(ours_BTV, expected_BTV, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_picture_gets_the_logits_of_stock_llava_after_saving(parts: Parts, tmp_path: Path) -> None:
    save_stock(parts, tmp_path / "student")
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "student").eval()
    image = torch.randint(0, 255, (3, 40, 50), dtype=torch.uint8)
    encoded = parts.processor(images=[image], text="what? <image> it is", return_tensors="pt")
    ids_BT = encoded["input_ids"]
    visual_BT = ids_BT == parts.stock.config.image_token_id
    inputs = Inputs(
        **{
            **vars(text_inputs(ids_BT)),
            "visual_BT": visual_BT,
            "pixels_ICHW": encoded["pixel_values"],
            "image_is_valid_I": torch.ones(1, dtype=torch.bool),
        }
    )
    mllm = MLLM(parts.stock).eval()
    ours_BTV = our_logits(parts, inputs, mllm.image_features(inputs))
    torch.testing.assert_close(ours_BTV, stock(**encoded).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_saved_student_answers_as_stock_generation_does(
    parts: Parts, directory: Path, tmp_path: Path
) -> None:
    """And its language model by itself, whose factor of logits nobody applies twice."""
    save_stock(parts, tmp_path / "student")
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "student").eval()
    alone = AutoModelForCausalLM.from_pretrained(directory).eval()
    ids_BT = torch.randint(0, 256, (1, 7), generator=torch.Generator().manual_seed(1))
    how = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "output_scores": True}
    given = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT), "return_dict_in_generate": True}
    found, expected = (model.generate(**given, **how) for model in (stock, alone))
    assert found.sequences.equal(expected.sequences)
    for ours, theirs in zip(found.scores, expected.scores, strict=True):
        is_there = theirs.isfinite()
        torch.testing.assert_close(ours[is_there], theirs[is_there], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_cap_is_dropped_where_that_is_asked_for(tower: str, tmp_path: Path) -> None:
    directory = make_language_model("gemma2", tmp_path / "capped", head_dim=8, initializer_range=0.3)
    alone = AutoModelForCausalLM.from_pretrained(directory).eval()
    parts = compose(vision_tower=tower, language_model=str(directory), drops_logit_cap=True)
    ids_BT = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))
    ours_BTV = our_logits(parts, text_inputs(ids_BT), torch.zeros(0, 1, 32))
    capped_BTV = alone(input_ids=ids_BT).logits
    torch.testing.assert_close(30 * torch.tanh(ours_BTV / 30), capped_BTV, rtol=1e-5, atol=1e-5)
    assert float((ours_BTV - capped_BTV).abs().max()) > 1e-3
    save_stock(parts, tmp_path / "student")
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "student").eval()
    assert stock.config.text_config.final_logit_softcapping is None  # or other readers would cap it again
    torch.testing.assert_close(stock(input_ids=ids_BT).logits, ours_BTV, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [259, 260, 300], ids=["too few", "just enough", "padding rows"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_an_image_token_moves_no_row(rows: int, tied: bool, tmp_path: Path) -> None:
    directory = make_language_model("llama", tmp_path / "llm", vocab_size=rows, tie_word_embeddings=tied)
    before = AutoModelForCausalLM.from_pretrained(directory)
    causal, tokenizer = load_language_model(str(directory), dtype=torch.float32)
    image_id = tokenizer.get_vocab()[IMAGE_TOKEN]
    for one, other in (
        (before.get_input_embeddings(), causal.get_input_embeddings()),
        (before.get_output_embeddings(), causal.get_output_embeddings()),
    ):
        assert len(other.weight) == max(rows, len(tokenizer)) > image_id
        torch.testing.assert_close(one.weight, other.weight[:rows], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("model_type", "settings", "message"),
    [
        (
            "gemma2",
            {"head_dim": 8},
            "caps its logits at 30, .* set drops_logit_cap next to language_model to true",
        ),
        ("gpt2", {}, "embed_tokens and layers"),
        ("opt", {}, "embed_tokens and layers"),
    ],
)
def test_a_model_that_stock_llava_would_change_is_refused(
    model_type: str, settings: dict[str, object], message: str, tmp_path: Path
) -> None:
    directory = make_language_model(model_type, tmp_path / model_type, **settings)
    with pytest.raises(ValueError, match=message):
        load_language_model(str(directory), dtype=torch.float32)


def test_a_bias_on_the_head_is_refused_unless_it_is_zero(tmp_path: Path) -> None:
    directory = make_language_model("phi", tmp_path / "phi")
    causal, _ = load_language_model(str(directory), dtype=torch.float32)
    head = causal.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear)
    assert head.bias is None
    weights = load_file(directory / "model.safetensors")
    weights["lm_head.bias"][3] = 0.5
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"bias on its head \(lm_head.bias, up to 0.5\)"):
        load_language_model(str(directory), dtype=torch.float32)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    """transformers would make one without words, and every text would be empty."""
    directory = make_language_model("qwen2", tmp_path / "model")
    for path in directory.glob("token*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"comes without a tokenizer; put tokenizer.json"):
        load_language_model(str(directory), dtype=torch.float32)


def test_a_missing_directory_comes_with_its_neighbours(tmp_path: Path) -> None:
    make_language_model("llama", tmp_path / "llama-tiny")
    with pytest.raises(ValueError, match=r"does not exist \(did you mean llama-tiny\?\)"):
        load_language_model(str(tmp_path / "llama-tine"), dtype=torch.float32)
