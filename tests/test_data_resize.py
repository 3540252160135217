"""The resize equals the installed Pillow's, bit for bit, in matrix products too: what a GPU runs."""

from __future__ import annotations

import io

import numpy as np
import PIL
import pytest
import torch
from data_samples import encoded_image, pixels
from PIL import Image

from llava_kd.data.pixels.images import ImageTransform, decode
from llava_kd.data.pixels.resize import BICUBIC, BILINEAR, resize, resize_by_products, resize_fast

PILLOW_MAJOR = int(PIL.__version__.split(".")[0])


def by_pillow(image: np.ndarray, size: tuple[int, int], resample: int) -> np.ndarray:
    """Pillow's own result, horizontal axis first, in one call where this version does that."""
    picture = Image.fromarray(image)
    shrink_h, shrink_w = image.shape[0] - size[0], image.shape[1] - size[1]
    vertical_first = PILLOW_MAJOR >= 13 and shrink_h > 0 and shrink_h > 2 * shrink_w
    if vertical_first:
        picture = picture.resize((size[1], image.shape[0]), Image.Resampling(resample))
    return np.array(picture.resize((size[1], size[0]), Image.Resampling(resample)))


def assert_equal_to_pillow(image: np.ndarray, size: tuple[int, int], resample: int) -> None:
    expected = by_pillow(image, size, resample)
    for function in (resize, resize_by_products):
        assert np.array_equal(function(torch.from_numpy(image), size, resample).numpy(), expected), (
            function.__name__,
            image.shape,
            size,
        )


@pytest.mark.parametrize("resample", [BILINEAR, BICUBIC], ids=["bilinear", "bicubic"])
def test_equals_pillow_on_random_sizes(resample: int) -> None:
    rng = np.random.default_rng(resample)
    for _ in range(400):
        height, width, *size = rng.integers(1, 120, 4).tolist()
        image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
        assert_equal_to_pillow(image, (size[0], size[1]), resample)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((480, 640), (384, 384)),
        ((640, 480), (384, 384)),
        ((333, 500), (336, 336)),
        ((1, 1), (30, 20)),
        ((1, 300), (24, 24)),
        ((900, 2), (24, 24)),
        ((50, 24), (24, 24)),
        ((24, 50), (24, 24)),
        ((24, 24), (24, 24)),
        ((2400, 3200), (48, 64)),
        ((30, 9000), (24, 24)),
    ],
)
def test_equals_pillow_on_chosen_sizes(shape: tuple[int, int], size: tuple[int, int]) -> None:
    assert_equal_to_pillow(pixels(*shape), size, BICUBIC)
    extremes = np.random.default_rng(0).choice(np.array([0, 255], dtype=np.uint8), (*shape, 3))
    assert_equal_to_pillow(extremes, size, BICUBIC)


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA"])
def test_equals_pillow_from_every_mode(mode: str) -> None:
    stream = io.BytesIO()
    Image.fromarray(pixels(70, 90)).convert(mode).save(stream, "JPEG" if mode in ("L", "CMYK") else "PNG")
    image = np.array(Image.open(stream).convert("RGB"))
    decoded = decode(stream.getvalue())
    assert np.array_equal(decoded.numpy(), image)
    assert_equal_to_pillow(decoded.numpy(), (31, 47), BICUBIC)


def test_fast_resize_is_close() -> None:
    image = decode(encoded_image(480, 640))
    difference = (
        resize_fast(image, (384, 384), BICUBIC).int() - resize(image, (384, 384), BICUBIC).int()
    ).abs()
    assert difference.max() <= 2
    assert (difference > 0).float().mean() < 0.02


def test_other_filters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be 2 \(bilinear\) or 3 \(bicubic\), got 1"):
        ImageTransform(size=(8, 8), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), resample=1)


@pytest.mark.gpu
def test_gpu_equals_cpu() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        height, width, *size = rng.integers(1, 400, 4).tolist()
        image = torch.from_numpy(rng.integers(0, 256, (height, width, 3)).astype(np.uint8))
        on_gpu = resize(image.cuda(), (size[0], size[1]), BICUBIC).cpu()
        assert torch.equal(on_gpu, resize(image, (size[0], size[1]), BICUBIC))
