"""Thin images: what resize, pad and crop make on the way is bounded, and the pixels are still Pillow's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from PIL import Image

from llava_kd.data.pixels import images
from llava_kd.data.pixels.images import MAX_SIDE, ImageTransform, check_size
from llava_kd.data.pixels.resize import _taps_on

PEAK = """
import sys, torch
from llava_kd.data.pixels.images import ImageTransform
height, width, aspect = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
transform = ImageTransform(size=(336, 336), mean=(0.5,) * 3, std=(0.5,) * 3, aspect=aspect, shortest_edge=336)
pixels = torch.zeros(height, width, 3, dtype=torch.uint8)
import resource
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (700 << 20),) * 2)
assert transform.resize(pixels).shape == (336, 336, 3)
"""


@pytest.mark.parametrize("aspect", ["square", "pad", "crop"])
def test_the_part_that_is_made_is_that_of_the_whole(aspect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    for number in range(200):
        height, width, *size = rng.integers(1, 130, 4).tolist()
        height, width = (1, width) if number % 5 == 0 else (height, 2) if number % 7 == 0 else (height, width)
        transform = ImageTransform(
            size=(size[0] // 3 + 1, size[1] // 3 + 1),
            mean=(0.48, 0.45, 0.4),
            std=(0.5, 0.5, 0.5),
            aspect=aspect,  # pyright: ignore[reportArgumentType]
            shortest_edge=max(size) // 3 + 1 + number % 4,
            resample=2 + number % 2,
        )
        image = torch.from_numpy(rng.choice(np.array([0, 255, 3, 200], np.uint8), (height, width, 3)))
        with monkeypatch.context() as patch:
            patch.setattr(images, "_MADE", 1 << 40)
            whole = transform.resize(image)
            patch.setattr(images, "_MADE", -(1 << 40))
            patch.setattr("llava_kd.data.pixels.resize._BLOCK", 1 << 8)
            patch.setattr("llava_kd.data.pixels.resize._COLUMNS", 16)
            inner = (max(height, width),) * 2 if aspect == "pad" else (height, width)
            part = transform._resize_part(image, inner, transform._whole_size(height, width))
        assert torch.equal(part, whole), (height, width, transform)


def test_a_thin_image_is_what_pillow_makes_of_the_whole() -> None:
    image = np.random.default_rng(0).integers(0, 256, (3, 20_000, 3)).astype(np.uint8)
    transform = ImageTransform(
        size=(60, 60), mean=(0.5,) * 3, std=(0.5,) * 3, aspect="crop", shortest_edge=64
    )
    whole = Image.fromarray(image).resize((64 * 20_000 // 3, 64), Image.Resampling.BICUBIC)
    left = (64 * 20_000 // 3 - 60) // 2
    expected = np.array(whole.crop((left, 2, left + 60, 62)))
    assert np.array_equal(transform.resize(torch.from_numpy(image)).numpy(), expected)


@pytest.mark.parametrize(
    ("height", "width", "aspect"),
    [(5000, 1, "crop"), (1, 3000, "crop"), (1000, 20_000, "pad"), (60_000, 1, "square")],
)
def test_memory_of_a_thin_image_is_bounded(tmp_path: Path, height: int, width: int, aspect: str) -> None:
    words = [PEAK, str(height), str(width), aspect]
    done = ranks.Ranks(words, tmp_path, function=ranks.execute).wait()
    assert done.codes == (0,), done.log[-300:]


def test_a_side_beyond_the_bound_is_refused() -> None:
    check_size(MAX_SIDE, 600, 10**9)
    for width, height in ((80_000_000, 1), (1, 80_000_000)):
        with pytest.raises(ValueError, match=f"at most {MAX_SIDE} pixels, got {width} x {height}"):
            check_size(width, height, 10**9)


def test_weights_of_long_axes_are_not_kept() -> None:
    transform = ImageTransform(size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3, aspect="crop", shortest_edge=8)
    before = _taps_on.cache_info().currsize
    image = torch.zeros(6000, 5000, 3, dtype=torch.uint8)[:, :1]
    transform._resize_part(image, (6000, 1), transform._whole_size(6000, 1))
    assert _taps_on.cache_info().currsize <= before + 1
