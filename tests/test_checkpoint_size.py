"""A checkpoint of the projector-only stage at the paper's sizes: its weights and moments, nothing frozen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen2Config, SiglipVisionConfig

from llava_kd.models.mllm import MLLM
from llava_kd.parallel.engine import STATE_KINDS, AdamWSettings, ParameterGroup
from llava_kd.parallel.torch_engine import TorchEngine
from llava_kd.parallel.world import World
from llava_kd.training.checkpoint import Checkpoints, Saved

TOWER = SiglipVisionConfig(
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    image_size=384,
    patch_size=14,
)
MB = 1_000_000


def paper_student() -> MLLM:
    """SigLIP-so400m-patch14-384 and Qwen2.5-0.5B, shapes alone, but for a real projector."""
    text = Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151_936,
        tie_word_embeddings=True,
    )
    config = LlavaConfig(vision_config=TOWER, text_config=text, vision_feature_select_strategy="full")
    with torch.device("meta"):
        stock = LlavaForConditionalGeneration(config)
    stock.model.multi_modal_projector.to_empty(device="cpu")
    for parameter in stock.model.multi_modal_projector.parameters():
        torch.nn.init.normal_(parameter)
    return MLLM(stock, trainable=("multi_modal_projector",))


def test_a_checkpoint_of_the_projector_stage_is_the_projector_and_its_moments(tmp_path: Path) -> None:
    mllm = paper_student()
    names = tuple(name for name, parameter in mllm.named_parameters() if parameter.requires_grad)
    engine = TorchEngine(
        mllm,
        [ParameterGroup(names=names, lr=1e-3)],
        world=World(rank=0, size=1, device=torch.device("cpu")),
        kind="single",
        adamw=AdamWSettings(),
        bf16=False,
    )
    for name in names:
        parameter = mllm.get_parameter(name)
        parameter.grad = torch.randn_like(parameter)
    engine.step(lr_multiplier=1.0, max_grad_norm=1.0)
    directory = Checkpoints(tmp_path, keep=1).save(Saved(step=1, state=engine.state()))

    weights = (1152 * 896 + 896) + (896 * 896 + 896)
    size = sum(path.stat().st_size for path in directory.iterdir())
    assert 12 * weights <= size < 12 * weights + 10_000
    assert size == pytest.approx(22.04 * MB, rel=1e-3)
    assert size < 60 * MB
    with safe_open(directory / "state.safetensors", "pt") as state:
        parts = {key.split(".")[0].split("/")[1] for key in state.keys()}  # noqa: SIM118
        assert parts == {"multi_modal_projector"}
        assert len(state.keys()) == len(STATE_KINDS) * 4
