"""Visual attention maps: what eager attention would give, beside an output that watching does not change.

Shape legend: B rows, T tokens, H heads, L layers, I images, N tokens of an image.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_batches import TOKENS, inputs, record
from tiny_decoders import tiny_decoder
from tiny_llava import make_tiny_llava
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlavaForConditionalGeneration

from llava_kd.batch import Inputs
from llava_kd.models.attention.visual import VisualMaps, check_maps, middle_layers, watchable
from llava_kd.models.files.checkpoint import load_stock
from llava_kd.models.language_model import checkpoint_activations
from llava_kd.models.mllm import MLLM
from llava_kd.models.projectors.width_map import width_map

LAYERS = range(1, 3)
RECORDS = [record(1), record(2, images=0, answer=9), record(3, images=2), record(4, prompt=11)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("deep") / "model", layers=4)


@pytest.fixture
def model(directory: Path) -> MLLM:
    trainable = ("multi_modal_projector", "language_model")
    return MLLM(load_stock(str(directory)).stock, trainable=trainable)


def eager_LINN(directory: Path, batch: Inputs) -> Tensor:
    """Heads averaged, block by block, from the stock model's own eager attention."""
    stock = LlavaForConditionalGeneration.from_pretrained(directory, attn_implementation="eager")
    attentions = stock(
        input_ids=batch.input_ids_BT, pixel_values=batch.pixels_ICHW, output_attentions=True
    ).attentions
    blocks = []
    for row, is_visual_T in enumerate(batch.visual_BT):
        images = is_visual_T.nonzero().squeeze(1).split(TOKENS) if bool(is_visual_T.any()) else ()
        for place in images:
            heads_LHTT = torch.stack([attentions[layer][row] for layer in LAYERS])
            blocks.append(heads_LHTT.mean(1)[:, place][:, :, place])
    return torch.stack(blocks, dim=1)


def test_maps_are_those_of_eager_attention(directory: Path, model: MLLM) -> None:
    batch = inputs(*RECORDS)
    model.watch_attention(LAYERS)
    with torch.no_grad():
        got = model(batch, model.image_features(batch)).attention_LINN
        expected = eager_LINN(directory, batch)
    assert got is not None
    assert got.shape == (2, 4, TOKENS, TOKENS)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_packed_records_show_the_maps_of_padded_ones(model: MLLM) -> None:
    model.watch_attention(LAYERS)
    with torch.no_grad():
        padded, packed = (
            model(batch, model.image_features(batch)).attention_LINN
            for batch in (inputs(*RECORDS), inputs(RECORDS[:2], RECORDS[2:]))
        )
    torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", [RECORDS, [RECORDS]], ids=["padded", "packed"])
def test_watching_changes_no_bit_of_the_output(directory: Path, model: MLLM, rows: list) -> None:
    batch = inputs(*rows)
    with torch.no_grad():
        before = model(batch, model.image_features(batch))
        model.watch_attention(LAYERS)
        after = model(batch, model.image_features(batch))
    assert before.attention_LINN is None
    assert torch.equal(before.hidden_BTD, after.hidden_BTD)


def test_a_batch_without_images_shows_empty_maps(model: MLLM) -> None:
    model.watch_attention(LAYERS)
    batch = inputs(record(1, images=0))
    maps_LINN = model(batch, model.image_features(batch)).attention_LINN
    assert maps_LINN is not None
    assert maps_LINN.shape[:2] == (2, 0)


def test_activation_checkpointing_leaves_the_gradient(directory: Path) -> None:
    found = []
    for checkpointed in (False, True):
        stock = load_stock(str(directory)).stock
        mllm = MLLM(stock, trainable=("multi_modal_projector", "language_model")).train()
        if checkpointed:
            checkpoint_activations(stock)
            stock.train()
        mllm.watch_attention(LAYERS)
        batch = inputs(*RECORDS)
        prediction = mllm(batch, mllm.image_features(batch))
        (prediction.attention_LINN.square().sum() + prediction.hidden_BTD.square().mean()).backward()
        found.append({name: p.grad for name, p in mllm.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-6)
    assert bool(found[0]["language_model.layers.2.self_attn.q_proj.weight"].any())


@pytest.mark.parametrize("family", ["llama", "gemma", "phi3", "qwen3"])
def test_other_families_show_their_maps(family: str) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        family, vocab_size=300, num_key_value_heads=2, head_dim=8, pad_token_id=0, **sizes
    )
    torch.manual_seed(0)
    decoder = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval().base_model
    batch = inputs(record(1), record(2, images=2))
    with torch.no_grad():
        embedded = decoder.get_input_embeddings()(batch.input_ids_BT)
        maps = VisualMaps(range(1, 3), batch)
        watchable(decoder)
        decoder(inputs_embeds=embedded, use_cache=False, visual_maps=[maps])
        got = maps.take()
        decoder.set_attn_implementation("eager")
        attentions = decoder(inputs_embeds=embedded, use_cache=False, output_attentions=True).attentions
    place = batch.visual_BT[1].nonzero().squeeze(1)[TOKENS:]
    expected = torch.stack([attentions[layer][1].mean(0)[place][:, place] for layer in (1, 2)])
    torch.testing.assert_close(got[:, 2], expected, rtol=1e-4, atol=1e-6)


def test_a_model_without_sdpa_is_refused(directory: Path) -> None:
    stock = LlavaForConditionalGeneration.from_pretrained(directory, attn_implementation="eager")
    with pytest.raises(ValueError, match="uses 'eager': take another model or drop the term"):
        MLLM(stock).watch_attention(LAYERS)


def test_layers_that_show_nothing_are_named(model: MLLM) -> None:
    with pytest.raises(ValueError, match=r"its layers \[4, 5\] report none"):
        model.watch_attention(range(3, 6))  # of four


def test_a_model_that_adds_to_its_queries_and_keys_is_refused() -> None:
    """A bias of its own: eager attention has other maps than the products show."""
    decoder = tiny_decoder("doge").base_model
    for name, parameter in decoder.named_parameters():
        if name.endswith(".A"):
            torch.nn.init.normal_(parameter)
    decoder.set_attn_implementation("sdpa")
    watchable(decoder)
    with pytest.raises(ValueError, match=r"this 'doge' model attends by: it adds something of its own"):
        check_maps(decoder, range(1, 2), torch.float32)
    assert decoder.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", ["llama", "gemma", "phi3", "qwen3", "gemma3_text"])
def test_plain_models_may_be_watched(family: str) -> None:
    decoder = tiny_decoder(family).base_model
    watchable(decoder)
    check_maps(decoder, range(0, 2), torch.float32)
    check_maps(decoder.bfloat16(), range(0, 2), torch.bfloat16)


@pytest.mark.parametrize(
    ("num_layers", "expected"),
    [(24, range(8, 17)), (28, range(9, 20)), (36, range(11, 26)), (10, range(3, 7)), (2, range(1, 2))],
)
def test_the_middle_layers(num_layers: int, expected: range) -> None:
    assert middle_layers(num_layers, 0.3, 0.7) == expected


def test_an_empty_middle_is_refused() -> None:
    with pytest.raises(ValueError, match="no layer of 1 lies between"):
        middle_layers(1, 0.3, 0.7)


def test_a_width_map_recovers_a_linear_relation() -> None:
    generator = torch.Generator().manual_seed(0)
    source_CD, map_DE = torch.randn(60, 6, generator=generator), torch.randn(6, 9, generator=generator)
    torch.testing.assert_close(width_map(source_CD, source_CD @ map_DE), map_DE, rtol=1e-3, atol=1e-3)
