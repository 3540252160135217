"""Grey of more than 8 bits is scaled or refused, never cut off; text inside a PNG is no fault of it."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from data_samples import pixels
from PIL import Image, PngImagePlugin

from llava_kd.data.pixels.images import FORMATS, decode
from llava_kd.data.pixels.modes import to_rgb

GREY = pixels(30, 41)[..., 0]
GREY[0, :2] = 0, 255


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def tiff(values: bytes, *, bits: int, photometric: int = 1, sample_format: int = 1) -> bytes:
    """An uncompressed grey TIFF of one strip, written by hand: Pillow does not write all of these."""
    tags = {256: 41, 257: 30, 258: bits, 259: 1, 262: photometric, 277: 1, 278: 30, 279: len(values)}
    tags[339], tags[273] = sample_format, 8 + 2 + 12 * 10 + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + values


def in_12_bits(values: np.ndarray) -> bytes:
    rows = []
    for row in np.pad(values, ((0, 0), (0, 1))):
        pairs = row.reshape(-1, 2).astype(int)
        packed = [(a >> 4, ((a & 15) << 4) | (b >> 8), b & 255) for a, b in pairs]
        rows.append(bytes(byte for three in packed for byte in three)[: (41 * 12 + 7) // 8])
    return b"".join(rows)


SIXTEEN = GREY.astype(np.uint16) * 257
SCALED = {
    "PNG of 16 bits": (saved(Image.fromarray(SIXTEEN), "PNG"), GREY),
    "PGM of 16 bits": (saved(Image.fromarray(SIXTEEN), "PPM"), GREY),
    "PGM of 12 bits": (b"P5 41 30 4095\n" + (GREY.astype(int) * 16 + 15).astype(">u2").tobytes(), GREY),
    "TIFF of 16 bits": (saved(Image.fromarray(SIXTEEN), "TIFF"), GREY),
    "TIFF of 16 bits, the other byte order": (
        saved(Image.fromarray(SIXTEEN.astype(">u2")), "TIFF"),
        GREY,
    ),
    "TIFF of 16 bits, white is 0": (tiff(SIXTEEN.tobytes(), bits=16, photometric=0), 255 - GREY),
    "TIFF of 12 bits": (tiff(in_12_bits(GREY.astype(int) * 16 + 7), bits=12), GREY),
    "TIFF of 8 bits": (tiff(GREY.tobytes(), bits=8), GREY),
    "TIFF of 8 bits, white is 0": (tiff(GREY.tobytes(), bits=8, photometric=0), 255 - GREY),
}
REFUSED = {
    "PGM of floats": (saved(Image.fromarray(GREY.astype(np.float32)), "PPM"), "floating-point"),
    "TIFF of floats": (saved(Image.fromarray(GREY.astype(np.float32) / 255), "TIFF"), "floating-point"),
    "TIFF of 32 bits": (tiff(GREY.astype("<u4").tobytes(), bits=32), "32-bit integers"),
    "TIFF of signed 32 bits": (saved(Image.fromarray(GREY.astype(np.int32)), "TIFF"), "signed"),
    "TIFF of signed 16 bits": (tiff(GREY.astype("<i2").tobytes(), bits=16, sample_format=2), "signed"),
    "TIFF of signed 8 bits": (tiff(GREY.tobytes(), bits=8, sample_format=2), "signed"),
    "PNG of 12 bits in 16": (saved(Image.fromarray(GREY.astype(np.uint16) * 16), "PNG"), "would be black"),
    "PNG of 8 bits in 16": (saved(Image.fromarray(GREY.astype(np.uint16)), "PNG"), "would be black"),
}


@pytest.mark.parametrize("name", SCALED)
def test_deep_grey_keeps_its_high_bits(name: str) -> None:
    data, expected = SCALED[name]
    assert np.array_equal(decode(data).numpy(), np.repeat(expected[..., None], 3, axis=2))


@pytest.mark.parametrize("name", REFUSED)
def test_values_without_a_known_range_are_refused_by_name(name: str) -> None:
    data, reason = REFUSED[name]
    with pytest.raises(ValueError, match=rf"cannot be read faithfully.*{reason}.*save it with 8 bits"):
        decode(data)


def test_a_black_picture_of_16_bits_is_black() -> None:
    assert decode(saved(Image.fromarray(np.zeros((3, 4), np.uint16)), "PNG")).sum() == 0


def test_every_mode_that_pillow_has_is_scaled_refused_or_as_convert_makes_it() -> None:
    faithful = ["1", "L", "P", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV", "LA", "PA"]
    image = Image.fromarray(pixels(8, 9))
    for mode in faithful:
        one = image.convert("RGBA").convert(mode) if mode in ("RGBa", "LA", "PA") else image.convert(mode)
        assert np.array_equal(to_rgb(one), np.array(one.convert("RGB"))), mode
    shared = Image.merge("LA", [image.getchannel(0), Image.new("L", (9, 8), 255)]).convert("La")
    assert np.array_equal(to_rgb(shared)[..., 1], np.array(image.getchannel(0)))
    for mode in ("I", "F"):
        with pytest.raises(ValueError, match=f"mode {mode}"):
            to_rgb(image.convert("L").convert(mode))


@pytest.mark.parametrize("compressed", [True, False])
def test_text_of_any_length_inside_a_png_is_no_fault(compressed: bool) -> None:
    image = Image.fromarray(pixels(30, 41))
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile", "x" * 3_000_000, zip=compressed)
    info.add_itxt("Other", "y" * 70_000_000, zip=True)
    data = saved(image, "PNG", pnginfo=info)
    with pytest.raises(ValueError, match="MAX_TEXT"):  # what Pillow says of it
        Image.open(io.BytesIO(data)).load()
    assert np.array_equal(decode(data).numpy(), pixels(30, 41))
    with pytest.raises(ValueError, match="damaged"):
        decode(data[:-40])


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_cut_anywhere_is_an_error_or_the_whole_picture(kind: str) -> None:
    data = saved(Image.fromarray(pixels(40, 56)), kind)
    whole = decode(data).numpy()
    for stop in np.random.default_rng(0).integers(1, len(data), 100).tolist():
        try:
            found = decode(data[:stop]).numpy()
        except ValueError:
            continue
        assert np.array_equal(found, whole), stop
