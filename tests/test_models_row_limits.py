"""Rows longer than a model reads as if each record were alone: refused, with the longest that it does."""

from __future__ import annotations

import pytest
import torch
from tiny_decoders import tiny_config, tiny_decoder
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from llava_kd.batch import Inputs
from llava_kd.models.attention.packed import read_rows
from llava_kd.models.attention.probe import rows_of
from llava_kd.models.attention.row_limits import check_rows

FACTORS = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 8.0}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64, **FACTORS}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


def longrope() -> dict[str, object]:
    return {"rope_parameters": dict(LONGROPE), "original_max_position_embeddings": 64}


def dynamic() -> dict[str, object]:
    return {"rope_parameters": dict(DYNAMIC), "max_position_embeddings": 64}


def embedded(model: PreTrainedModel, batch: Inputs) -> Tensor:
    return model.get_input_embeddings()(batch.input_ids_BT)


@torch.no_grad()
def beside(model: PreTrainedModel, length: int) -> Tensor:
    """What a record of 10 tokens is read as in a batch with one of so many."""
    batch = rows_of([[list(range(10))], [[7] * length]], torch.device("cpu"))
    return read_rows(model, batch, embedded(model, batch))[0, :10]


@pytest.mark.parametrize(("kind", "changes"), [("phi3", longrope()), ("llama", dynamic())])
def test_the_longest_record_allowed_is_the_longest_that_changes_no_other(
    kind: str, changes: dict[str, object]
) -> None:
    model = tiny_decoder(kind, **changes).base_model
    short, at_limit, beyond = (beside(model, length) for length in (10, 64, 65))
    torch.testing.assert_close(at_limit, short, rtol=1e-4, atol=1e-4)
    assert float((beyond - short).norm() / short.norm()) > 1e-3
    check_rows(model.config, max_length=64, max_tokens=300)
    with pytest.raises(ValueError, match=rf"max_length` is 65.*'{kind}'.*to at most 64"):
        check_rows(model.config, max_length=65, max_tokens=None)


def test_padding_of_a_packed_row_does_not_turn_the_positions() -> None:
    """A row of two records beside one padded with more tokens than the positions are made for."""
    model = tiny_decoder("phi3", **longrope()).base_model
    short, long = list(range(10)), [7] * 40
    with torch.no_grad():
        few = rows_of([[short, short]], torch.device("cpu"))
        expected = read_rows(model, few, embedded(model, few))[0]
        many = rows_of([[short, short], [long, long, short]], torch.device("cpu"))
        found = read_rows(model, many, embedded(model, many))[0, :20]
    assert int(many.position_ids_BT.max()) >= 64
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def nested() -> PreTrainedConfig:
    config = tiny_config("gemma3_text")
    config.rope_parameters = {"full_attention": dict(LONGROPE), "sliding_attention": {"rope_type": "default"}}
    return config


@pytest.mark.parametrize(
    ("config", "max_length", "max_tokens", "message"),
    [
        (tiny_config("qwen2"), 513, None, "'qwen2' language model has 512 positions"),
        (tiny_config("biogpt"), 513, None, "'biogpt' language model has 512 positions"),
        (tiny_config("gpt2"), 513, None, "has 512 positions"),
        (nested(), 65, None, "longrope RoPE.*to at most 64"),
        (tiny_config("doge"), 17, None, "`data.max_length` is 17.*keep_window_size.*'doge'"),
        (tiny_config("deepseek_v32"), 17, None, "index_topk"),
        (tiny_config("llama4_text"), 16, 17, "`data.packing.max_tokens` is 17.*attention_chunk_size"),
        (tiny_config("deepseek_v4"), 16, 16, "the layers .*compressed_sparse_attention"),
    ],
)
def test_what_is_too_long_is_refused(
    config: PreTrainedConfig, max_length: int, max_tokens: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_rows(config, max_length=max_length, max_tokens=max_tokens)


def test_what_fits_is_taken() -> None:
    check_rows(tiny_config("qwen2"), max_length=512, max_tokens=100_000)
    check_rows(tiny_config("llama4_text"), max_length=100, max_tokens=None)
    check_rows(tiny_config("llama", rope_parameters=dict(DYNAMIC)), max_length=512, max_tokens=None)
