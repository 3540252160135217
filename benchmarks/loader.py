"""The data loader: images per CPU-second, packing, and the index.

Images: 640x480 JPEG to 384x384 pixels as SigLIP reads them, from the bytes of a file, against transformers'
own processors in the same run. Rates are per CPU-second of one thread, so that a busy machine does not count.
Worker: the same from files through a worker process, ours with the text of the records.
Parts: where that time goes, and other ways to the same pixels that were tried and are not used.
Packing: a LLaVA-like mixture (729 places an image, lognormal text, cut at 2,048), which is assumed: the
distribution of the real 665k records was not at hand.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import statistics
import tempfile
import time
from bisect import bisect_left, insort
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from _common import Row, meta, parser, print_table, write_json
from _loader_workers import worker_rows
from PIL import Image
from transformers import SiglipImageProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from llava_kd.data.batches.collate import RawImages
from llava_kd.data.batches.packing import Packing, RecordSizes, pack
from llava_kd.data.batches.plan import Plan, permutation
from llava_kd.data.pixels import compiled
from llava_kd.data.pixels.device_decode import plain_jpeg_size
from llava_kd.data.pixels.images import ImageTransform, decode
from llava_kd.data.pixels.kept_pages import KeptPages
from llava_kd.data.pixels.resize import resize_by_c, resize_by_pillow, resize_by_products, resize_fast, taps
from llava_kd.data.sources.llava_json import LlavaJson

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

SIZE = {"height": 384, "width": 384}
NUM_RECORDS = 665_298


def picture(seed: int, height: int = 480, width: int = 640) -> bytes:
    """JPEG of quality 90 with edges, shades and some noise: about as many bytes as a photograph."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (height // 24, width // 24, 3)).astype(np.uint8))
    smooth = np.array(small.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    noisy = smooth + rng.normal(0, 6, smooth.shape)
    stream = io.BytesIO()
    Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def image_rows(repeats: int) -> list[Row]:
    """Images per CPU-second of each way, the ways taken in turn."""
    files = [picture(seed) for seed in range(8)]
    stock_pil, stock = SiglipImageProcessorPil(size=SIZE), SiglipImageProcessor(size=SIZE)
    exact = ImageTransform.from_processor(stock_pil)
    fast = ImageTransform.from_processor(stock_pil, exact=False)

    def by_stock(processor: SiglipImageProcessor | SiglipImageProcessorPil) -> Callable[[bytes], object]:
        return lambda data: processor(Image.open(io.BytesIO(data)), return_tensors="pt")

    ways: dict[str, Callable[[bytes], object]] = {
        "transformers, Pillow": by_stock(stock_pil),
        f"transformers, {type(stock).__name__}": by_stock(stock),
        "ours, all on the CPU, equal to Pillow": lambda data: exact(decode(data)),
        "ours, the same without the part in C": without_c(lambda data: exact(decode(data))),
        "ours, all on the CPU, quick resize": lambda data: fast(decode(data)),
        "ours, the CPU's part with a GPU": lambda data: RawImages.of([decode(data)]),
        "ours, the CPU's part with nvJPEG": lambda data: RawImages.of([undecoded(data)]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(repeats + 1):
        for name, way in ways.items():
            started = time.process_time()
            for data in files:
                way(data)
            if number:
                seconds[name].append((time.process_time() - started) / len(files))
    rates = {name: 1 / statistics.median(values) for name, values in seconds.items()}
    base = rates["transformers, Pillow"]
    return [
        {"part": "images", "what": name, "value": rate, "unit": "images per CPU-second", "ratio": rate / base}
        for name, rate in rates.items()
    ]


def without_c(way: Callable) -> Callable:
    """The way as it goes where no compiler was."""

    def call(*words: object) -> object:
        kernels, compiled.KERNELS = compiled.KERNELS, ()
        try:
            return way(*words)
        finally:
            compiled.KERNELS = kernels

    return call


def through_worker() -> list[Row]:
    stock_pil, stock = SiglipImageProcessorPil(size=SIZE), SiglipImageProcessor(size=SIZE)
    stocks = {"transformers, Pillow": stock_pil, f"transformers, {type(stock).__name__}": stock}
    return worker_rows([picture(seed) for seed in range(8)], stocks, ImageTransform.from_processor(stock_pil))


def undecoded(data: bytes) -> torch.Tensor:
    """What a worker hands to a device that decodes."""
    if plain_jpeg_size(data) is None:
        raise RuntimeError("nvJPEG does not get this picture")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def part_rows(repeats: int) -> list[Row]:
    """CPU milliseconds of each part of an image's way, and of ways that were tried for it."""
    files = [picture(seed) for seed in range(4)]
    images = [decode(data) for data in files]
    transform = ImageTransform.from_processor(SiglipImageProcessorPil(size=SIZE))
    resized = [transform.resize(image) for image in images]
    size = transform.size
    bicubic = transform.resample
    if any(not torch.equal(by_bands(a, size, bicubic), b) for a, b in zip(images, resized, strict=True)):
        raise RuntimeError("the banded products are not equal to Pillow's resize")
    pages = KeptPages()
    parts: dict[str, tuple[Callable, list]] = {
        "decode": (decode, files),
        "resize, equal to Pillow": (transform.resize, images),
        "resize, equal to Pillow, plain C": (lambda i: resize_by_c(i, size, bicubic, "plain"), images),
        "resize, by Pillow": (lambda image: resize_by_pillow(image, size, bicubic), images),
        "resize, quick": (lambda image: resize_fast(image, size, bicubic), images),
        "normalise": (lambda image: transform.normalise(image[None], pages), resized),
        "normalise, by PyTorch": (without_c(lambda i: transform.normalise(i[None], pages)), resized),
        "tried: exact resize as products of bands in fp64": (lambda i: by_bands(i, size, bicubic), images),
        "tried: exact resize as dense products in fp64": (
            lambda image: resize_by_products(image, size, bicubic),
            images,
        ),
        "tried: decode and resize all in Pillow": (by_pillow, files),
    }
    if simplejpeg is not None:
        parts["tried, not exact: decode at 7/8 of the size"] = (decode_reduced, files)
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for number in range(repeats + 1):
        for name, (way, inputs) in parts.items():
            started = time.process_time()
            for one in inputs:
                way(one)
            if number:
                seconds[name].append((time.process_time() - started) / len(inputs))
    return [
        {
            "part": "parts",
            "what": name,
            "value": 1e3 * statistics.median(values),
            "unit": "CPU ms an image",
        }
        for name, values in seconds.items()
    ]


def by_pillow(data: bytes) -> np.ndarray:
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    return np.array(picture.resize((SIZE["width"], SIZE["height"]), Image.Resampling.BICUBIC))


def decode_reduced(data: bytes) -> np.ndarray:
    """By the decoder's own scaling, to the smallest size that still covers the target."""
    assert simplejpeg is not None
    return simplejpeg.decode_jpeg(
        data, colorspace="RGB", min_height=SIZE["height"], min_width=SIZE["width"], min_factor=1
    )


def by_bands(pixels_HWC: torch.Tensor, size: tuple[int, int], resample: int) -> torch.Tensor:
    """Pillow's resize as small products: 16 outputs read only the inputs that their filters reach."""
    height, width, channels = pixels_HWC.shape
    columns = pixels_HWC.permute(1, 0, 2).reshape(width, height * channels)
    across = _banded(columns, size[1], resample).view(size[1], height, channels)
    rows = across.permute(1, 0, 2).reshape(height, size[1] * channels)
    return _banded(rows, size[0], resample).view(size[0], size[1], channels)


def _banded(lines: torch.Tensor, size: int, resample: int) -> torch.Tensor:
    bands, firsts = _bands(len(lines), size, resample)
    wide = lines.double()
    windows = torch.stack([wide[first : first + bands.shape[2]] for first in firsts])
    sums = torch.bmm(bands, windows).flatten(0, 1)[:size]
    return sums.mul_(2.0**-22).add_(0.5).floor_().clamp_(0, 255).to(torch.uint8)


@lru_cache(maxsize=8)
def _bands(size_in: int, size_out: int, resample: int, group: int = 16) -> tuple[torch.Tensor, list[int]]:
    weights = np.zeros((size_out, size_in))
    places, values = taps(size_in, size_out, resample)
    np.add.at(weights, (np.arange(size_out)[:, None], places), values)
    groups = [weights[start : start + group] for start in range(0, size_out, group)]
    reached = [np.flatnonzero(np.abs(rows).sum(0)) for rows in groups]
    span = max(int(places[-1] - places[0]) + 1 for places in reached)
    firsts = [min(int(places[0]), size_in - span) for places in reached]
    bands = np.zeros((len(groups), group, span))
    for band, rows, first in zip(bands, groups, firsts, strict=True):
        band[: len(rows)] = rows[:, first : first + span]
    return torch.from_numpy(bands), firsts


def llava_like(num_records: int) -> RecordSizes:
    rng = np.random.default_rng(0)
    images = (rng.random(num_records) < 0.94).astype(np.int32)
    text = np.clip(rng.lognormal(5.2, 0.75, num_records), 12, 1300).astype(np.int32)
    return RecordSizes(tokens=np.minimum(images * 729 + text, 2048), images=images)


def best_fit_decreasing(order: np.ndarray, sizes: RecordSizes, packing: Packing) -> int:
    """Number of packs that the textbook method makes of each window."""
    num_packs = 0
    for start in range(0, len(order), packing.window):
        rooms: list[int] = []
        for length in sorted(sizes.tokens[order[start : start + packing.window]].tolist(), reverse=True):
            place = bisect_left(rooms, length)
            room = rooms.pop(place) if place < len(rooms) else packing.max_tokens
            num_packs += room == packing.max_tokens
            insort(rooms, room - length)
    return num_packs


def packing_rows() -> list[Row]:
    sizes = llava_like(NUM_RECORDS)
    rows: list[Row] = []
    for max_tokens in (4096, 8192, 16_384):
        packing = Packing(max_tokens=max_tokens)
        started, wall = time.process_time(), time.perf_counter()
        plan = Plan(
            num_records=NUM_RECORDS, seed=0, global_batch_size=128, world_size=8, packing=packing, sizes=sizes
        )
        plan.rows(0, 0)
        cpu, wall = time.process_time() - started, time.perf_counter() - wall
        order = permutation(NUM_RECORDS, seed=0, epoch=0)
        total = int(sizes.tokens.sum()) / max_tokens
        fills = {
            "fill": total / len(pack(order, sizes, packing)),
            "fill of best-fit-decreasing": total / best_fit_decreasing(order, sizes, packing),
        }
        rows += [
            {"part": "packing", "what": f"{name}, {max_tokens} tokens", "value": value, "unit": "share"}
            for name, value in fills.items()
        ]
        for clock, value in (("CPU", cpu), ("wall", wall)):
            what = f"plan of {NUM_RECORDS} records, {max_tokens} tokens, {clock}"
            rows.append({"part": "packing", "what": what, "value": value, "unit": "s"})
    return rows


def index_rows() -> list[Row]:
    """What 100k records cost a worker that reads them all, packed and as a plain list."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.json"
        path.write_text(json.dumps([_entry(i) for i in range(100_000)]))
        started = time.perf_counter()
        source = LlavaJson(path, folder, cache=Path(folder) / "cache")
        built = time.perf_counter() - started
        context = multiprocessing.get_context("spawn")
        with context.Pool(1) as pool:
            packed = pool.apply(_bytes_of_reading, (source,))
        with context.Pool(1) as pool:
            plain = pool.apply(_bytes_of_list, (path,))
    return [
        {"part": "index", "what": "building it, 100k records", "value": built, "unit": "s"},
        {"part": "index", "what": "private memory of a worker", "value": packed / 2**20, "unit": "MiB"},
        {"part": "index", "what": "the same as a list", "value": plain / 2**20, "unit": "MiB"},
    ]


def _entry(i: int) -> dict:
    words = " ".join(f"word{(i * 7 + k) % 997}" for k in range(60))
    asked = {"from": "human", "value": f"<image>\nWhat is in picture {i}?"}
    return {"id": i, "image": f"{i}.jpg", "conversations": [asked, {"from": "gpt", "value": words}]}


def _private_bytes() -> int:
    """Of this process alone; pages of a mapped file that still wait to be written to disk do not count."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


def _bytes_of_reading(source: LlavaJson) -> int:
    before = _private_bytes()
    for i in range(len(source)):
        source.record(i)
    return _private_bytes() - before


def _bytes_of_list(path: Path) -> int:
    before = _private_bytes()
    entries = json.loads(path.read_bytes())
    return _private_bytes() - before + 0 * len(entries)


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--repeats", type=int, default=15)
    flags = arguments.parse_args()
    torch.set_num_threads(flags.threads or 1)
    if not compiled.KERNELS:
        raise SystemExit("the part in C is not built: python setup.py build_ext --inplace")
    images = [*image_rows(flags.repeats), *through_worker(), *part_rows(flags.repeats)]
    rows = [*images, *packing_rows(), *index_rows()]
    print_table(rows, ["part", "what", "value", "unit", "ratio"])
    if flags.json:
        write_json(flags.json, meta=meta(device="cpu", resizer=compiled.resizer()), rows=rows)


if __name__ == "__main__":
    main()
