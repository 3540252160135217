"""Memory is written again when nobody reads it, and never before."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch.nn.functional import conv2d

from llava_kd.data.pixels import kept_pages
from llava_kd.data.pixels.kept_pages import KeptPages

SHAPE = (2, 3, 8, 8)


def place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_what_was_dropped_is_lent_again_and_what_is_held_is_not() -> None:
    pages = KeptPages()
    first = pages.take(SHAPE)
    second = pages.take(SHAPE)
    assert place(first) != place(second)
    freed = place(first)
    del first
    assert place(pages.take((1, 3, 8, 8))) == freed


@pytest.mark.parametrize("holder", ["view", "numpy", "detached", "autograd", "list in a thread"])
def test_every_way_of_holding_counts(holder: str) -> None:
    pages = KeptPages()
    taken = pages.take(SHAPE).fill_(1.0)
    release = threading.Event()
    weight = torch.ones(1, 3, 1, 1, requires_grad=True)

    def hold(tensors: list[torch.Tensor]) -> None:
        release.wait()
        assert tensors

    if holder == "list in a thread":
        thread = threading.Thread(target=hold, args=([taken],), daemon=True)
        thread.start()
        held: object = thread
    else:
        ways = {
            "view": lambda t: t[1:, :, 2:4].permute(0, 2, 3, 1),
            "numpy": lambda t: t.numpy(),
            "detached": lambda t: t.detach(),
            "autograd": lambda t: conv2d(t, weight).sum(),
        }
        held = ways[holder](taken)
    busy = place(taken)
    del taken
    other = pages.take(SHAPE).fill_(7.0)
    assert place(other) != busy
    if isinstance(held, torch.Tensor) and held.requires_grad:
        held.backward()
        assert weight.grad is not None
        assert float(weight.grad[0, 0]) == 2 * 8 * 8
    if isinstance(held, np.ndarray):
        assert (held == 1.0).all()
    release.set()


def test_a_larger_block_replaces_idle_ones_and_only_some_lie_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_pages, "_SPARE", 2)
    pages = KeptPages()
    several = [pages.take(SHAPE) for _ in range(6)]
    assert len({place(tensor) for tensor in several}) == 6
    del several
    pages.take(SHAPE)
    assert len(pages._arrays) == 3
    large = pages.take((4, *SHAPE))
    assert len(pages._arrays) == 1
    assert large.shape == (4, *SHAPE)
    assert place(large) % 64 == 0
