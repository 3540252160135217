"""A tiny random model of any causal language model type that the installed transformers knows.

Sizes are set by the names that configs give them, windows and chunks to `WINDOW` tokens, and there are layers
of each kind that a type has by default.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

WINDOW, VOCABULARY = 16, 264
_SIZES = {
    32: "hidden_size d_model n_embd dim embed_dim embedding_size emb_dim lru_width attention_hidden_size "
    "embedding_dim d_inner input_embedding_size output_embedding_size word_embed_proj_dim ple_embed_dim",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "swa_num_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts mamba_n_heads "
    "mamba_num_heads linear_num_value_heads linear_num_heads index_n_heads num_encoder_attention_heads "
    "num_decoder_attention_heads o_lora_rank hc_lowrank rel_extent",
    2: "num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok num_experts_per_token "
    "moe_topk moe_k moe_top_k encoder_layers decoder_layers num_encoder_layers num_decoder_layers "
    "linear_num_key_heads o_groups hc_mult hc_count num_query_groups n_mamba_heads",
    1: "n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group num_expert_group "
    "num_dense_layers first_k_dense_replace num_kv_shared_layers mamba_n_groups mamba_ngroups n_groups",
    8: "head_dim attention_head_dim swa_head_dim kv_channels dim_head d_kv d_head linear_key_head_dim "
    "linear_value_head_dim linear_head_dim index_head_dim mamba_d_state state_size ssm_state_size "
    "mamba_d_head mamba_head_dim kv_lora_rank q_lora_rank v_head_dim qk_nope_head_dim qk_rope_head_dim "
    "rotary_dim mamba_dt_rank time_step_rank attention_head_size adapter_rank global_head_dim "
    "hidden_size_per_layer_input laurel_rank d_rel zero_expert_num router_hidden_size gated_norm_rank",
    48: "intermediate_size ffn_dim moe_intermediate_size n_inner encoder_ffn_dim decoder_ffn_dim "
    "shared_expert_intermediate_size ffn_hidden_size dff dim_ff d_ff intermediate_size_mlp "
    "expert_ffn_hidden_size dense_intermediate_size moe_shared_expert_intermediate_size "
    "shared_experts_intermediate_size feed_forward_size shared_intermediate_size",
    WINDOW: "sliding_window attention_chunk_size index_topk sliding_window_size keep_window_size "
    "attention_window_size local_attention",
    VOCABULARY: "encoder_hash_byte_group_vocab vocab_size vocab_size_per_layer_input "
    "unpadded_vocab_size ngram_vocab_size_base",
    512: "max_position_embeddings n_positions n_ctx max_seq_len model_max_length",
}
_BY_NAME = {name: size for size, names in _SIZES.items() for name in names.split()}
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_PARTS = (
    "text_config",
    "vision_config",
    "audio_config",
    "decoder_config",
    "vq_config",
    "llm_config",
    "patcher_config",
    "encoder_config",
    "global_config",
)
_TWO_KINDS = ["linear_attention", "full_attention"]
_CONV = ["conv", "full_attention"]
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# What follows from other settings of a type, or is not there by default, and no rule by name knows.
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_d_head": 16, "attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {"adapter_in_dim": 32, "adapter_out_dim": 32},
    "falcon_h1": {"mamba_d_ssm": 32},
    "gemma3n": {"text_config": {"num_kv_shared_layers": 0}},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_d_head": 16, "layer_types": _TWO_KINDS},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": _CONV},
    "lfm2_moe": {"layer_types": _CONV},
    "mamba2": {"head_dim": 16},
    "ministral": {"head_dim": 8},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "qwen4_exp_text": {
        **{"indexer_budget": WINDOW, "indexer_compress_ratio": 4, "indexer_n_heads": 2},
        **{"indexer_kv_heads": 1, "indexer_head_dim": 8},
    },
    "emu3": {"vq_config": {"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1}},
    "reformer": {"is_decoder": True},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
}


def tiny_config(kind: str, **changes: object) -> PreTrainedConfig:
    """Of the type `kind`. Raises whatever its class raises for sizes that it does not take."""
    default = CONFIG_MAPPING[kind]().to_dict()
    return CONFIG_MAPPING[kind](**{**_shrunk(default), **_OWN.get(kind, {}), **changes})


def tiny_decoder(kind: str, **changes: object) -> PreTrainedModel:
    """Wide weights, so that whatever a token sees shows in its output."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(tiny_config(kind, **changes))
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.float().eval()


def _shrunk(default: dict[str, Any]) -> dict[str, Any]:
    """The settings of a default config that are smaller here."""
    small: dict[str, Any] = {}
    kinds = {key: list(dict.fromkeys(default.get(key) or ())) for key in ("layer_types", "mlp_layer_types")}
    depth = max(2, *(len(names) for names in kinds.values()))
    for key, value in default.items():
        if isinstance(value, dict) and key in _PARTS:
            small[key] = _shrunk(value)
        elif key in _DEPTHS and isinstance(value, int):
            small[key] = depth
        elif key == "num_key_value_heads" and "kv_lora_rank" in default:
            small[key] = 4
        elif key in _BY_NAME and isinstance(value, int) and not isinstance(value, bool):
            small[key] = min(value, _BY_NAME[key])
        elif key in ("bos_token_id", "eos_token_id", "pad_token_id") and value is not None:
            small[key] = 0
    for key, names in kinds.items():
        if names:
            small[key] = [names[i % len(names)] for i in range(depth)]
    return small
