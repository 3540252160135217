"""Which JPEGs a GPU may decode, and that they come out as the CPU's, in their places."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from data_samples import encoded_image, entry, loader_of, micros_of, pixels, side, write_dataset
from PIL import Image

from llava_kd.data.batches.device_stage import to_batch
from llava_kd.data.batches.micro_batches import MicroBatches
from llava_kd.data.batches.plan import Plan
from llava_kd.data.pixels.device_decode import decode_jpegs, plain_jpeg_size
from llava_kd.data.pixels.images import decode
from llava_kd.data.sources.llava_json import LlavaJson

SIDE = side()
CPU = torch.device("cpu")


def jpeg(height: int = 40, width: int = 56, *, mode: str = "RGB", **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels(height, width)).convert(mode).save(stream, "JPEG", **options)
    return stream.getvalue()


def micro_batches(source: LlavaJson, decoder: str, *, max_pixels: int = 10**6) -> MicroBatches:
    return micros_of(
        source=source,
        sides=(SIDE,),
        plan=Plan(num_records=len(source), seed=0, global_batch_size=8, world_size=1),
        micro_batch_size=8,
        rank=0,
        max_pixels=max_pixels,
        leaves_raw=True,
        decoder=decoder,  # pyright: ignore[reportArgumentType]
    )


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("size", [(40, 56), (1, 1), (33, 7)])
def test_size_of_a_baseline_jpeg(size: tuple[int, int], subsampling: str) -> None:
    assert plain_jpeg_size(jpeg(*size, subsampling=subsampling)) == size


def test_size_is_not_that_of_a_thumbnail_in_the_metadata() -> None:
    thumbnail = jpeg(8, 8)
    marked = jpeg(exif=b"Exif\x00\x00" + thumbnail, comment=thumbnail)
    assert marked.count(b"\xff\xc0") == 3
    assert plain_jpeg_size(marked) == (40, 56)


@pytest.mark.parametrize(
    "data",
    [
        jpeg(progressive=True),
        jpeg(mode="L"),
        jpeg(mode="CMYK"),
        jpeg(keep_rgb=True),
        encoded_image(kind="PNG"),
        b"",
        b"\xff\xd8\xff\xd9",
        b"\xff\xd8" + b"\xff" * 50 + b"\xff\xd9",
    ],
    ids=["progressive", "grey", "cmyk", "rgb", "png", "empty", "no frame", "fill"],
)
def test_other_files_are_left_to_the_cpu(data: bytes) -> None:
    assert plain_jpeg_size(data) is None


def test_a_jpeg_cut_anywhere_is_left_to_the_cpu() -> None:
    data = jpeg()
    assert plain_jpeg_size(data) is not None
    assert all(plain_jpeg_size(data[:stop]) is None for stop in range(len(data)))


def test_jpegs_in_the_middle_of_others_keep_their_places(tmp_path: Path) -> None:
    entries = [entry(i, images=i % 3) for i in range(16)]  # JPEGs and PNGs
    path = write_dataset(tmp_path, entries)
    (tmp_path / "images/4_0.jpg").write_bytes(jpeg(progressive=True))
    (tmp_path / "images/7_0.jpg").unlink()
    source = LlavaJson(path, tmp_path)
    seen = 0
    for key in ((0, 0), (1, 0)):
        on_device, on_cpu = (micro_batches(source, decoder)[key] for decoder in ("nvjpeg", "cpu"))
        assert on_device.raw is not None
        assert on_cpu.raw is not None
        seen += len(on_device.raw.jpegs)
        assert len(on_cpu.raw.jpegs) == 0
        one, other = (to_batch(micro, (SIDE,), CPU) for micro in (on_device, on_cpu))
        assert on_device.bad == on_cpu.bad
        assert torch.equal(one.student.pixels_ICHW, other.student.pixels_ICHW)
    assert seen > 0


def test_too_many_pixels_are_found_before_the_device_decodes(tmp_path: Path) -> None:
    source = LlavaJson(write_dataset(tmp_path, [entry(i) for i in range(8)]), tmp_path)
    (tmp_path / "images/1_0.jpg").write_bytes(jpeg(200, 300))
    (bad,) = micro_batches(source, "nvjpeg", max_pixels=50_000)[0, 0].bad
    assert (bad.id, "at most 50000 pixels, got 300 x 200" in bad.reason) == ("r1", True)


def test_a_damaged_jpeg_stops_the_run_and_names_its_records(tmp_path: Path) -> None:
    source = LlavaJson(write_dataset(tmp_path, [entry(i) for i in range(8)]), tmp_path)
    data = bytearray(jpeg())
    table = data.index(b"\xff\xc4")
    data[table + 5 : table + 21] = b"\xff" * 16  # more codes than there are
    assert plain_jpeg_size(bytes(data)) == (40, 56)
    (tmp_path / "images/1_0.jpg").write_bytes(data)
    micro = micro_batches(source, "nvjpeg")[0, 0]
    with pytest.raises(ValueError, match=r"records .*\br1\b.* is damaged .*set data.decode to cpu"):
        to_batch(micro, (SIDE,), CPU)


def test_nvjpeg_needs_a_gpu(tmp_path: Path) -> None:
    source = LlavaJson(write_dataset(tmp_path, [entry(0)]), tmp_path)
    with pytest.raises(ValueError, match=r"`data.decode` nvjpeg decodes on a CUDA device, but .* cpu"):
        loader_of(
            source=source, student=SIDE, teacher=None, seed=0, global_batch_size=1, micro_batch_size=1,
            rank=0, world_size=1, device="cpu", decoder="nvjpeg",
        )  # fmt: skip


def test_decoded_pixels_are_laid_out_as_those_of_the_cpu() -> None:
    data = jpeg()
    (image_HWC,) = decode_jpegs([torch.frombuffer(bytearray(data), dtype=torch.uint8)], CPU)
    assert image_HWC.is_contiguous()
    assert torch.equal(image_HWC, decode(data))


@pytest.mark.gpu
def test_gpu_pixels_differ_by_the_chroma_filter_only() -> None:
    for subsampling, most in (("4:4:4", 3), ("4:2:0", 40)):
        data = jpeg(480, 640, subsampling=subsampling, quality=90)
        (image,) = decode_jpegs([torch.frombuffer(bytearray(data), dtype=torch.uint8)], torch.device("cuda"))
        difference = (image.cpu().int() - decode(data).int()).abs()
        assert difference.max() <= most
        assert difference.float().mean() < 2


@pytest.mark.gpu
def test_gpu_decoding_leaves_memory_in_use_alone() -> None:
    """Blocks that queued work of the stream still reads are given back to the allocator and decoded into."""
    device = torch.device("cuda")
    encoded = [torch.frombuffer(bytearray(jpeg(480, 640)), dtype=torch.uint8) for _ in range(8)]
    factor = torch.randn(4096, 4096, device=device)
    for _ in range(200):
        blocks = [torch.full((480 * 640 * 3,), 7, dtype=torch.uint8, device=device) for _ in range(8)]
        for _ in range(10):
            factor = factor @ factor / 4096  # keeps the stream busy, so that the sums below are late
        sums = torch.stack([block.sum() for block in blocks])
        del blocks
        decode_jpegs(encoded, device)
        assert (sums == 7 * 480 * 640 * 3).all()
