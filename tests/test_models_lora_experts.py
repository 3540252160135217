"""Adapters of decoders that mix experts: which matrices get one, and that what they learn is merged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_llava import tiny_processor
from tiny_towers import make_language_model, make_tower
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

pytest.importorskip("peft", reason="the lora extra is not installed")

from peft import LoraConfig, inject_adapter_in_model

from llava_kd.cli import main
from llava_kd.models.files.checkpoint import Parts, save_stock
from llava_kd.models.lora import adapted_share, add_adapters, is_adapter, merge_adapters, try_merge
from llava_kd.models.mllm import MLLM

EXPERTS = {  # of the shapes below
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    **dict.fromkeys(("first_k_dense_replace", "moe_layer_start_index", "n_group", "topk_group"), 1),
    **dict.fromkeys(("n_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("v_head_dim", "head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8),
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
}
# Shared experts or a dense first layer, whose matrices are called as those of the experts once were; then
# those without, a router that calls itself linear, and a model without experts.
SHARED = (
    "ernie4_5_moe",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "qwen3_next",
    "hunyuan_v1_moe",
    "qwen2_moe",
)
KINDS = (*SHARED, "qwen3_moe", "mixtral", "olmoe", "granitemoe", "phimoe", "llama")


def text_settings(kind: str) -> dict[str, object]:
    known = AutoConfig.for_model(kind).to_dict()
    common = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
    }
    if kind == "qwen3_next":
        common["layer_types"] = ["linear_attention", "full_attention"]
    return {name: value for name, value in (common | EXPERTS).items() if name in known}


def llava(kind: str) -> LlavaForConditionalGeneration:
    tower = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    text = AutoConfig.for_model(
        kind, vocab_size=264, pad_token_id=0, bos_token_id=1, eos_token_id=2, **text_settings(kind)
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=tower,
            text_config=text,
            image_token_index=259,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
    ).eval()


@torch.no_grad()
def logits_BTV(stock: LlavaForConditionalGeneration) -> torch.Tensor:
    return stock(input_ids=torch.tensor([[1, 2, 3, 5, 8, 13]])).logits


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_put_in_is_merged_into_a_stock_model(kind: str, tmp_path: Path) -> None:
    stock = llava(kind)
    before = {name: value.clone() for name, value in stock.state_dict().items()}
    try_merge(stock, rank=2, targets=None)
    plain_BTV = logits_BTV(stock)
    add_adapters(stock, rank=2, alpha=8.0, dropout=0.0, targets=None, seed=1)
    torch.testing.assert_close(logits_BTV(stock), plain_BTV, rtol=0, atol=0)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in stock.named_parameters():
        if is_adapter(name):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    adapted_BTV = logits_BTV(stock)
    assert float((adapted_BTV - plain_BTV).abs().max()) > 0.01
    weights = {name: value.detach().clone() for name, value in MLLM(stock).named_parameters()}
    merged = merge_adapters(stock, weights)
    save_stock(Parts(stock=stock, processor=tiny_processor()), tmp_path / "model", trained=merged)
    after = LlavaForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    assert {n: v.shape for n, v in after.state_dict().items()} == {n: v.shape for n, v in before.items()}
    torch.testing.assert_close(logits_BTV(after), adapted_BTV, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_share_is_counted_from_what_moves(kind: str) -> None:
    stock = llava(kind)
    text = adapted_share(stock, None)
    before = {
        n: p.clone() for n, p in stock.named_parameters() if "language_model.layers" in n and p.ndim > 1
    }
    add_adapters(stock, rank=2, alpha=8.0, dropout=0.0, targets=None, seed=1)
    for name, parameter in stock.named_parameters():
        if is_adapter(name):
            parameter.data.fill_(0.5)
    merged = merge_adapters(stock, dict(MLLM(stock).named_parameters()))
    moved = [n for n, old in before.items() if not torch.equal(merged[n.removeprefix("model.")], old)]
    share = sum(before[n].numel() for n in moved) / sum(value.numel() for value in before.values())
    assert text.startswith(f"adapters on {len(moved)} matrices, {share:.0%} of the decoder layers' weights")
    assert ("not on" in text) == (share < 1)
    assert share == 1 or "experts" in text


def test_adapters_that_cannot_be_merged_are_named() -> None:
    """As peft puts them on the tensor that holds every expert, had it the choice."""
    stock = llava("mixtral")
    settings = LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    inject_adapter_in_model(settings, stock.model.language_model.layers)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts.*cannot be merged.*student\.lora to null"):
        merge_adapters(stock, dict(MLLM(stock).named_parameters()))


@pytest.mark.parametrize("kind", ["deepseek_v3", "phimoe"])
def test_a_stage_with_adapters_ends_with_its_model(
    stage, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    language_model = make_language_model(kind, tmp_path / "llm", **text_settings(kind))
    config = stage("run", distilled=False, max_steps=1)
    short = "--data.max_length=256"  # as many positions as the model has
    tower = make_tower("siglip", tmp_path / "tower")
    parts = f"vision_tower: '{tower}', language_model: '{language_model}'"
    student = f"--student={{{parts}, lora: {{rank: 2}}}}"
    assert main(["train", str(config), student, short]) == 0
    assert "adapters on" in capsys.readouterr().err
    names = load_file(tmp_path / "run" / "model" / "model.safetensors").keys()
    odd = [name for name in names if is_adapter(name) or "base_layer" in name]
    assert not odd
    LlavaForConditionalGeneration.from_pretrained(tmp_path / "run" / "model")
