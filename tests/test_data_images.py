"""Decoding is strict and equal to Pillow's; the transform is equal to the stock image processor's."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from data_samples import encoded_image, pixels
from PIL import Image, ImageCms
from transformers import SiglipImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from llava_kd.data.pixels import images
from llava_kd.data.pixels.images import ImageTransform, decode

LAB = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
# No tall ones: Pillow 13 resizes some of them in another order than the checkpoints were trained with.
SIZES = [(40, 56), (40, 50), (24, 24), (1, 1), (1, 70), (33, 200)]


def by_pillow(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture(params=["simplejpeg", "pillow"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each installation: with the quick JPEG decoder and without."""
    if request.param == "simplejpeg":
        pytest.importorskip("simplejpeg", reason="the quick decoder is an optional extra")
    else:
        monkeypatch.setattr(images, "simplejpeg", None)
        monkeypatch.setattr(images, "cv2", None)
    return request.param


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "RGBA", "LA", "1", "PA", "YCbCr", "LAB"])
def test_every_mode_becomes_rgb_as_pillow_does(decoder: str, mode: str) -> None:
    rgb = Image.fromarray(pixels(30, 41))
    kind = "JPEG" if mode in ("L", "CMYK") else "TIFF" if mode in ("YCbCr", "LAB") else "PNG"
    if mode == "PA":
        image = rgb.convert("P").convert("PA")
        kind = "TIFF"
    elif mode == "LAB":
        image = ImageCms.applyTransform(rgb, LAB)
    elif mode in ("RGBA", "LA"):
        image = rgb.convert(mode)
        image.putalpha(Image.fromarray(pixels(30, 41)[..., 1]))
    else:
        image = rgb.convert(mode)
    data = saved(image, kind)
    assert np.array_equal(decode(data).numpy(), by_pillow(data))


@pytest.mark.parametrize("options", [{"quality": 30}, {"progressive": True}, {"subsampling": 0}])
def test_jpeg_pixels_equal_pillows(decoder: str, options: dict) -> None:
    data = saved(Image.fromarray(pixels(61, 83)), "JPEG", **options)
    assert np.array_equal(decode(data).numpy(), by_pillow(data))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_other_formats_equal_pillows(kind: str) -> None:
    data = encoded_image(kind=kind)
    assert np.array_equal(decode(data).numpy(), by_pillow(data))


def test_orientation_tag_is_ignored(decoder: str) -> None:
    image = Image.fromarray(pixels(20, 30))
    exif = image.getexif()
    exif[0x0112] = 6
    assert decode(saved(image, "JPEG", exif=exif)).shape == (20, 30, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_cut_file_is_an_error(decoder: str, kind: str, share: float) -> None:
    data = encoded_image(100, 120, kind=kind)
    with pytest.raises(ValueError, match=r"damaged|not a readable image"):
        decode(data[: int(len(data) * share)])


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "empty"), (b"<html></html>", "not a readable image"), (b"\xff\xd8\xff", "not a readable image")],
)
def test_what_is_no_image_is_an_error(decoder: str, data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        decode(data)


def test_harmless_bytes_are_accepted(decoder: str) -> None:
    data = encoded_image(60, 70)
    for harmless in (data + b"trailing", data[:-2] + b"\x00\x11" + data[-2:]):
        assert np.array_equal(decode(harmless).numpy(), by_pillow(data))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_image_size_is_bounded_before_decoding(decoder: str, kind: str) -> None:
    data = encoded_image(100, 120, kind=kind)
    assert decode(data, max_pixels=12_000).shape == (100, 120, 3)
    with pytest.raises(ValueError, match="at most 11999 pixels, got 120 x 100"):
        decode(data, max_pixels=11_999)


def test_decompression_bomb_is_refused_without_decoding() -> None:
    stream = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(stream, "PNG")
    with pytest.raises(ValueError, match=r"not a readable image|may have at most"):
        decode(stream.getvalue())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_random_damage_gives_pixels_or_a_value_error(kind: str) -> None:
    rng = np.random.default_rng(0)
    data = np.frombuffer(encoded_image(kind=kind), np.uint8)
    for _ in range(60):
        damaged = data.copy()
        damaged[rng.integers(len(data), size=rng.integers(1, 40))] = rng.integers(256)
        try:
            assert decode(damaged.tobytes(), max_pixels=10**6).shape[2] == 3
        except ValueError:
            continue


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resample", [2, 3], ids=["bilinear", "bicubic"])
def test_square_equals_the_stock_siglip_processor(size: tuple[int, int], resample: int) -> None:
    processor = SiglipImageProcessorPil(size={"height": 24, "width": 32}, resample=resample)
    check_against(processor, size, ImageTransform.from_processor(processor))


@pytest.mark.parametrize("size", [(40, 56), (56, 41), (24, 24), (33, 200)])
def test_crop_equals_the_stock_clip_processor(size: tuple[int, int]) -> None:
    processor = CLIPImageProcessorPil(size={"shortest_edge": 26}, crop_size={"height": 24, "width": 24})
    transform = ImageTransform.from_processor(processor)
    assert transform.aspect == "crop"
    check_against(processor, size, transform)


@pytest.mark.parametrize("size", SIZES)
def test_pad_equals_the_stock_llava_processor(size: tuple[int, int]) -> None:
    processor = LlavaImageProcessorPil(
        size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}, do_pad=True
    )
    transform = ImageTransform.from_processor(processor)
    assert transform.aspect == "pad"
    check_against(processor, size, transform)


def check_against(
    processor: SiglipImageProcessorPil, size: tuple[int, int], transform: ImageTransform
) -> None:
    image = pixels(*size)
    expected = processor(Image.fromarray(image), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(transform(torch.from_numpy(image)), expected, rtol=0, atol=0)


def test_pad_setting_pads_with_the_mean_colour() -> None:
    processor = SiglipImageProcessorPil(size={"height": 40, "width": 40})
    padded = ImageTransform.from_processor(processor, "pad").resize(torch.zeros(40, 20, 3, dtype=torch.uint8))
    assert padded[:, :10].unique().tolist() == [127]
    assert padded[:, 10:30].unique().tolist() == [0]


def test_both_backends_of_a_processor_give_the_same_transform() -> None:
    sizes = {"height": 24, "width": 24}
    one, other = SiglipImageProcessor(size=sizes), SiglipImageProcessorPil(size=sizes)
    assert ImageTransform.from_processor(one) == ImageTransform.from_processor(other)


def test_processor_without_a_fixed_size_is_an_error() -> None:
    processor = CLIPImageProcessorPil(size={"shortest_edge": 24}, do_center_crop=False)
    with pytest.raises(ValueError, match="must give a fixed size"):
        ImageTransform.from_processor(processor)


@pytest.mark.parametrize("rescale", [1 / 255, 1 / 256, 0.0078, 1.0])
def test_normalisation_is_exact_with_odd_settings(rescale: float) -> None:
    processor = SiglipImageProcessorPil(
        size={"height": 24, "width": 24},
        rescale_factor=rescale,
        image_mean=[0.4814, 0.4578, 0.4082],
        image_std=[0.2686, 0.2613, 0.2757],
    )
    check_against(processor, (24, 24), ImageTransform.from_processor(processor))
