"""Models on their device in their types."""

from __future__ import annotations

from pathlib import Path

import torch

from llava_kd.assembly.parts.models import place
from llava_kd.models.files.checkpoint import load_stock
from llava_kd.models.mllm import MLLM, PARTS

CPU = torch.device("cpu")


def test_placing_casts_the_weights_and_not_the_computed_constants(student_dir: Path) -> None:
    stock = load_stock(str(student_dir)).stock
    before = {name: value.clone() for name, value in stock.named_buffers()}
    assert any("inv_freq" in name for name in before)
    place(MLLM(stock), CPU, dict.fromkeys(PARTS, torch.bfloat16))
    assert {parameter.dtype for parameter in stock.parameters()} == {torch.bfloat16}
    for name, value in stock.named_buffers():
        assert value.dtype == before[name].dtype, name
        assert torch.equal(value, before[name]), name
    assert not any("inv_freq" in name for name in stock.state_dict())


def test_a_model_placed_in_bf16_is_the_one_that_transformers_reads_in_bf16(student_dir: Path) -> None:
    """Late positions tell rotary frequencies in bf16 from those in fp32."""
    placed, read = (load_stock(str(student_dir), dtype=d).stock for d in (torch.float32, torch.bfloat16))
    place(MLLM(placed), CPU, dict.fromkeys(PARTS, torch.bfloat16))
    ids = torch.arange(1, 9)[None]
    positions = torch.arange(1500, 1508)[None]
    outputs = [m(input_ids=ids, position_ids=positions).logits for m in (placed.eval(), read.eval())]
    assert torch.equal(outputs[0], outputs[1])
