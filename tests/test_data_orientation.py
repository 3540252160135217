"""`data.exif`: photos as they are stored, or turned upright as Pillow does, and nothing else about them."""

from __future__ import annotations

import io
import random
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import entry, loader_of, micros_of, pixels, side, write_dataset
from PIL import Image, ImageOps

from llava_kd.data.batches.device_stage import to_batch
from llava_kd.data.batches.plan import Plan
from llava_kd.data.pixels import images
from llava_kd.data.pixels.images import ImageTransform, decode, orientation
from llava_kd.data.sources.llava_json import LlavaJson
from llava_kd.data.verify import verify
from llava_kd.evaluation.generation import chat, generate
from llava_kd.evaluation.generation.questions import Question

TAG = 0x0112
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF")


def photo(tag: object, kind: str = "JPEG", *, height: int = 20, width: int = 33, **options: object) -> bytes:
    """An image whose camera was held as `tag` says."""
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[TAG] = tag
    Image.fromarray(pixels(height, width)).save(stream, kind, **{"exif": exif, **options})
    return stream.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    return np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


@pytest.fixture(params=["simplejpeg", "pillow"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each installation: with the quick JPEG decoder and without."""
    if request.param == "simplejpeg":
        pytest.importorskip("simplejpeg", reason="the quick decoder is an optional extra")
    else:
        monkeypatch.setattr(images, "simplejpeg", None)
        monkeypatch.setattr(images, "cv2", None)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("tag", range(1, 9))
def test_a_photo_is_turned_as_pillow_turns_it(decoder: None, tag: int, kind: str) -> None:
    data = photo(tag, kind)
    upright = decode(data, upright=True).numpy()
    assert upright.shape[:2] == ((33, 20) if tag > 4 else (20, 33))
    assert np.array_equal(upright, by_pillow(data))
    assert orientation(data) == (1 if kind == "TIFF" else tag)  # that one Pillow turns as it reads
    if kind != "TIFF":
        assert np.array_equal(decode(data).numpy(), np.array(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 0}, {"quality": 5}])
def test_other_jpegs_are_turned_too(decoder: None, options: dict) -> None:
    data = photo(6, **options)
    assert np.array_equal(decode(data, upright=True).numpy(), by_pillow(data))


def block(kind: int, count: int, value: bytes, behind: bytes = b"") -> bytes:
    """An EXIF block of one orientation tag, of any type and number of values."""
    entries = struct.pack(">HHHI", 1, TAG, kind, count) + value.ljust(4, b"\0") + bytes(4)
    return b"Exif\0\0MM\0*" + struct.pack(">I", 8) + entries + behind


@pytest.mark.parametrize(
    ("exif", "is_turned"),
    {
        "0": (block(3, 1, b"\0\0"), False),
        "9": (block(3, 1, b"\0\x09"), False),
        "a long 6": (block(4, 1, struct.pack(">I", 6)), True),
        "a byte 6": (block(1, 1, b"\x06"), False),
        "-1": (block(8, 1, b"\xff\xff"), False),
        "text": (block(2, 2, b"6\0"), False),
        "two values": (block(3, 2, b"\0\x06\0\x03"), True),
        "12/2": (block(5, 1, struct.pack(">I", 26), struct.pack(">II", 12, 2)), True),
        "13/2": (block(5, 1, struct.pack(">I", 26), struct.pack(">II", 13, 2)), False),
        "6/0": (block(5, 1, struct.pack(">I", 26), struct.pack(">II", 6, 0)), False),
    }.values(),
)
def test_a_tag_of_another_kind_means_to_us_what_it_means_to_pillow(exif: bytes, is_turned: bool) -> None:
    data = photo(1, exif=exif)
    upright = decode(data, upright=True).numpy()
    assert np.array_equal(upright, by_pillow(data))
    assert (upright.shape == (33, 20, 3)) == is_turned


def test_an_orientation_that_stands_in_xmp_counts() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'
    data = photo(1, exif=b"", xmp=xmp)
    assert np.array_equal(decode(data, upright=True).numpy(), by_pillow(data))
    assert decode(data, upright=True).shape == (33, 20, 3)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of each block
def test_a_damaged_block_is_no_bad_picture_and_never_another_turn_than_pillows() -> None:
    chance = random.Random(0)
    whole = Image.Exif()
    whole[TAG], whole[0x010E], whole[0x011A] = 6, "a photo", 72.0
    block = whole.tobytes()
    seen = {"as Pillow does": 0, "cannot be read": 0}
    for _ in range(400):
        damaged = bytearray(block)
        for _ in range(chance.randrange(1, 4)):
            damaged[chance.randrange(6, len(damaged))] = chance.randrange(256)
        damaged = damaged[: chance.choice([len(damaged), chance.randrange(6, len(damaged))])]
        kind = chance.choice(["JPEG", "PNG", "WEBP"])
        data = photo(1, kind, height=4, width=6, exif=bytes(damaged))
        stored, upright = decode(data).numpy(), decode(data, upright=True).numpy()
        try:
            Image.open(io.BytesIO(data)).getexif()
        except Exception:  # Pillow raises errors of many kinds for a damaged block
            assert np.array_equal(upright, stored)
            seen["cannot be read"] += 1
            continue
        try:
            expected = by_pillow(data)
        except Exception:  # it has read the tag, and cannot write the block without it
            continue
        assert np.array_equal(upright, expected), bytes(damaged)
        seen["as Pillow does"] += 1
    assert min(seen.values()) > 20, seen


@pytest.mark.parametrize("upright", [False, True])
def test_a_picture_is_bad_either_way_or_neither(upright: bool) -> None:
    with pytest.raises(ValueError, match=r"damaged|not a readable image"):
        decode(photo(6)[:-200], upright=upright)
    with pytest.raises(ValueError, match="at most 100 pixels"):
        decode(photo(6), upright=upright, max_pixels=100)


def photos(folder: Path) -> LlavaJson:
    """Eight records, whose photos have each of the tags."""
    path = write_dataset(folder, [entry(i) for i in range(8)])
    for i in range(8):
        (image,) = (folder / "images").glob(f"{i}_0.*")
        image.write_bytes(photo(i or 8, "PNG" if image.suffix == ".png" else "JPEG", height=9 + i))
    return LlavaJson(path, folder)


def stored(source: LlavaJson, record_id: str) -> bytes:
    return source.image_bytes(int(record_id[1:]), 0)


@pytest.mark.parametrize("upright", [False, True])
def test_training_sees_photos_turned_where_it_is_told_so(tmp_path: Path, upright: bool) -> None:
    source, reader = photos(tmp_path), replace(side(), upright=upright)
    loader = loader_of(
        source=source, student=reader, teacher=reader, seed=0, global_batch_size=8, micro_batch_size=8,
    )  # fmt: skip
    ((batch,),) = loader.batches(0, 1)
    assert batch.teacher is not None
    for record_id, seen, by_teacher in zip(
        batch.record_ids, batch.student.pixels_ICHW, batch.teacher.pixels_ICHW, strict=True
    ):
        data = stored(source, record_id)
        image = by_pillow(data) if upright else np.array(Image.open(io.BytesIO(data)))
        assert torch.equal(seen, reader.transform(torch.from_numpy(image))), record_id
        assert torch.equal(seen, by_teacher)


def test_a_device_decodes_only_what_need_not_be_turned(tmp_path: Path) -> None:
    """nvJPEG turns nothing: a tagged photo is the CPU's, and the rest stays the device's."""
    source = photos(tmp_path)
    left = {}
    for upright in (False, True):
        reader = replace(side(), upright=upright)
        plan = Plan(num_records=8, seed=0, global_batch_size=8, world_size=1)
        micro = micros_of(
            source=source, sides=(reader,), plan=plan, micro_batch_size=8, leaves_raw=True, decoder="nvjpeg"
        )[0, 0]
        assert micro.raw is not None
        left[upright] = sum(len(shape) == 1 for shape in micro.raw.shapes)
        batch = to_batch(micro, (reader,), torch.device("cpu"))
        for record_id, seen in zip(micro.record_ids, batch.student.pixels_ICHW, strict=True):
            image = decode(stored(source, record_id), upright=upright)
            assert torch.equal(seen, reader.transform(image)), record_id
    assert left == {False: 5, True: 1}  # the JPEGs, and the one with tag 1


def test_a_thin_photo_is_bounded_by_its_sides_as_they_are_seen(tmp_path: Path) -> None:
    """3 x 1,000 stored, 1,000 x 3 seen: what the resize makes, and crops, follows the second."""
    data = photo(6, height=3, width=1000)
    transform = ImageTransform(
        size=(24, 24), mean=(0.5,) * 3, std=(0.5,) * 3, aspect="crop", shortest_edge=256
    )  # fmt: skip
    seen = decode(data, upright=True)
    assert seen.shape == (1000, 3, 3)
    assert transform.is_thin(*seen.shape[:2])
    whole = Image.fromarray(by_pillow(data))
    scaled = int(256 * 1000 / 3)
    for step in ((256, 1000), (256, scaled)):  # the width first, as every Pillow before 13
        whole = whole.resize(step, Image.Resampling.BICUBIC)
    top, left = (scaled - 24) // 2, (256 - 24) // 2
    expected = np.array(whole)[top : top + 24, left : left + 24]
    assert np.array_equal(transform.resize(seen).numpy(), expected)


def test_verify_counts_a_photo_with_a_damaged_block_as_sound(tmp_path: Path) -> None:
    source = photos(tmp_path)
    (image,) = (tmp_path / "images").glob("1_0.*")
    image.write_bytes(photo(1, exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken"))
    for upright in (False, True):
        assert verify(source, side=replace(side(), upright=upright)).is_sound


def test_eval_and_chat_open_a_photo_as_they_are_told(tmp_path: Path) -> None:
    (path := tmp_path / "photo.jpg").write_bytes(photo(6))
    asked = Question(id="q", text="<image>", images=(path,))
    for upright in (False, True):
        expected = decode(path.read_bytes(), upright=upright).numpy()
        (image,), _ = generate.pictures(asked, upright)
        assert np.array_equal(np.asarray(image), expected)
        assert np.array_equal(np.asarray(chat._open(str(path), upright)), expected)


def test_only_a_side_that_turns_has_another_fingerprint() -> None:
    plain, turns = side(), replace(side(), upright=True)
    assert plain.text_fingerprint == turns.text_fingerprint
    assert plain.fingerprint != turns.fingerprint
