"""Operations counted from shapes, against PyTorch's counter of what really runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_batches import inputs, record
from tiny_decoders import tiny_decoder
from tiny_llava import make_tiny_llava
from tiny_towers import TOWERS, make_language_model, make_tower
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaForConditionalGeneration

from llava_kd.models.files.checkpoint import compose
from llava_kd.models.flops import Backward, Flops, head_rows, of_tower, peak_of
from llava_kd.models.mllm import MLLM
from llava_kd.models.towers.vision_tower import input_size
from llava_kd.training.measuring.operations import PEAKS

STAGES = {
    "nothing": (),
    "projector": ("multi_modal_projector",),
    "projector and language model": ("multi_modal_projector", "language_model"),
    "all": ("vision_tower", "multi_modal_projector", "language_model"),
}


def batch():
    """Two records of one picture each, of equal length: stock models read no packed rows."""
    return inputs(record(1, prompt=20, answer=12), record(2, prompt=20, answer=12))


@pytest.mark.parametrize("tower", ["siglip", "clip"])
@pytest.mark.parametrize("trainable", STAGES.values(), ids=STAGES.keys())
def test_a_step_takes_what_pytorch_counts(tmp_path: Path, tower, trainable: tuple[str, ...]) -> None:
    strategy = "default" if tower == "clip" else "full"
    directory = make_tiny_llava(tmp_path, tower=tower, strategy=strategy, feature_layer=-1)
    stock = LlavaForConditionalGeneration.from_pretrained(directory, attn_implementation="eager")
    MLLM(stock, trainable=trainable)
    read = batch()
    with FlopCounterMode(display=False) as counter:
        logits = stock(
            input_ids=read.input_ids_BT.masked_fill(read.visual_BT, stock.config.image_token_index),
            pixel_values=read.pixels_ICHW,
        ).logits
        if trainable:
            logits.sum().backward()
    flops = Flops.of(stock)
    parameters = dict(stock.named_parameters(remove_duplicate=False))
    counted = flops.of_inputs(
        read,
        head_rows=read.input_ids_BT.numel(),
        tower_image=of_tower(stock.model.vision_tower, *read.pixels_ICHW.shape[2:]),
        backward=Backward.of(parameters),
    )
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.03)


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "qwen2", "gemma2", "granitemoe"])
def test_a_decoder_is_counted_by_the_experts_that_a_token_meets(tmp_path: Path, kind: str) -> None:
    decoder = tiny_decoder(kind)
    stock = LlavaForConditionalGeneration.from_pretrained(make_tiny_llava(tmp_path))
    config = stock.config
    config.text_config = decoder.config
    with torch.device("meta"):
        holder = LlavaForConditionalGeneration(config)
    flops = Flops.of(holder)
    length = 12
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        decoder.set_attn_implementation("eager")
        decoder.set_experts_implementation("eager")  # PyTorch counts no grouped product
        decoder(input_ids=torch.arange(2 * length).view(2, length))
    expected = counter.get_total_flops()
    counted = 2 * length * flops.token + 2 * length**2 * flops.pair + 2 * length * flops.row
    assert counted == pytest.approx(expected, rel=0.03)


def test_a_model_that_only_answers_has_no_backward(tmp_path: Path) -> None:
    stock = LlavaForConditionalGeneration.from_pretrained(make_tiny_llava(tmp_path))
    flops, read = Flops.of(stock), batch()
    answering = flops.of_inputs(read, head_rows=10)
    trained = flops.of_inputs(
        read, head_rows=10, backward=Backward(projector=1, decoder=1, head=1, through_decoder=True)
    )
    assert answering < trained < 3 * answering + 1
    assert flops.of_inputs(read, head_rows=11) - answering == flops.row


def test_rows_of_the_head_are_those_that_terms_ask_for() -> None:
    read = batch()
    assert head_rows(read, {"response"}) == len(read.places.response_N) > 0
    assert head_rows(read, {"visual"}) == len(read.places.distilled_N) > 0
    assert head_rows(read, set()) == 0


def test_the_longest_name_of_a_device_is_the_one_that_counts() -> None:
    assert peak_of("NVIDIA H100 PCIe", PEAKS) == 756e12
    assert peak_of("NVIDIA H100 80GB HBM3", PEAKS) == 989.4e12
    assert peak_of("NVIDIA L40S", PEAKS) == 362e12
    assert peak_of("cpu", PEAKS) is None


@pytest.mark.parametrize("family", TOWERS)
def test_every_tower_is_counted_and_stays_as_it_was(tmp_path: Path, family: str) -> None:
    line = make_tower(family, tmp_path / family)
    language_model = make_language_model("qwen2", tmp_path / "lm")
    parts = compose(vision_tower=line, language_model=str(language_model), seed=3)
    tower = parts.stock.model.vision_tower.train()
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    weights = sum(p.numel() for p in tower.parameters() if p.ndim > 1)
    assert of_tower(tower, *input_size(parts.processor.image_processor)) > weights
    assert tower.training
    assert all(torch.equal(before[name], tensor) for name, tensor in tower.state_dict().items())


def test_attention_of_a_tower_is_counted_whatever_computes_it(tmp_path: Path) -> None:
    directory, counts = make_tiny_llava(tmp_path), set()
    for kernel in ("eager", "sdpa"):
        stock = LlavaForConditionalGeneration.from_pretrained(directory, attn_implementation=kernel)
        counts.add(of_tower(stock.model.vision_tower, 32, 32))
    assert len(counts) == 1
