"""The checksum by which ranks compare their weights."""

from __future__ import annotations

import pytest
import torch

from llava_kd.parallel import replicas
from llava_kd.parallel.replicas import bits_sum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8])
def test_every_flipped_bit_and_every_swap_is_seen(dtype: torch.dtype) -> None:
    tensor = (torch.arange(1, 25) * 1.5).to(dtype).view(4, 6)
    whole = int(bits_sum(tensor))
    raw = tensor.clone().view(torch.uint8).flatten()
    for byte in range(len(raw)):
        for bit in range(8):
            raw[byte] ^= 1 << bit
            assert int(bits_sum(raw.view(dtype).view(4, 6))) != whole, (byte, bit)
            raw[byte] ^= 1 << bit
    swapped = tensor.flatten().clone()
    swapped[[2, 17]] = swapped[[17, 2]]
    assert int(bits_sum(swapped)) != whole
    assert int(bits_sum(tensor.clone())) == whole


def test_numbers_of_other_chunks_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "_CHUNK", 7)
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    whole = int(bits_sum(tensor))
    for k, n in ((0, 7), (3, 990), (6, 13)):
        swapped = tensor.clone()
        swapped[[k, n]] = swapped[[n, k]]
        assert int(bits_sum(swapped)) != whole


def test_an_oracle_in_python_gives_the_same() -> None:
    tensor = torch.tensor([1.0, -2.0, 0.5])
    bits = tensor.view(torch.int32).tolist()
    total = sum(b * (2 * k + 1) * replicas._FACTOR for k, b in enumerate(bits)) % 2**64
    assert int(bits_sum(tensor)) % 2**64 == total


def test_an_empty_parameter_has_a_sum() -> None:
    assert int(bits_sum(torch.empty(0, 3))) == 0
