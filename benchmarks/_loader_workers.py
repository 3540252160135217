"""Images through one worker process to a batch in the trainer's process: CPU-seconds of both together."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from _common import Row
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer, BaseImageProcessor

from llava_kd.data.batches.device_stage import to_batch
from llava_kd.data.batches.loader import Loader
from llava_kd.data.batches.micro_batches import MicroBatches
from llava_kd.data.batches.model_side import Side
from llava_kd.data.batches.order import Order, Reading
from llava_kd.data.batches.plan import Plan
from llava_kd.data.pixels.device_decode import Decoder
from llava_kd.data.pixels.images import MAX_PIXELS, ImageTransform
from llava_kd.data.pixels.kept_pages import KeptPages
from llava_kd.data.sources.llava_json import LlavaJson
from llava_kd.data.text.template_table import TEMPLATES

TOKENIZER = Path(__file__).parents[1] / "scripts/quickstart/backbones/teacher"
BATCH = 32
ROUNDS = 3
WARM_UP, MEASURED, AHEAD = 4, 12, 8  # batches; the last are those that a worker makes while we stop the clock
NUM_RECORDS = BATCH * (WARM_UP + MEASURED + AHEAD)  # so that none comes twice


class ByProcessor(Dataset[torch.Tensor]):
    """What the LLaVA family's data sets give the loader: pixels in fp32."""

    def __init__(self, paths: list[Path], processor: BaseImageProcessor) -> None:
        self._paths, self._processor = paths, processor

    def __len__(self) -> int:
        return NUM_RECORDS

    def __getitem__(self, i: int) -> torch.Tensor:
        image = Image.open(io.BytesIO(self._paths[i % len(self._paths)].read_bytes())).convert("RGB")
        return self._processor(image, return_tensors="pt")["pixel_values"][0]


def worker_rows(
    pictures: list[bytes], processors: dict[str, BaseImageProcessor], transform: ImageTransform
) -> list[Row]:
    """Images per CPU-second of `processors` in a stock `DataLoader`, and of our `Loader`, with its text."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = [folder / f"{number}.jpg" for number in range(len(pictures))]
        for path, data in zip(paths, pictures, strict=True):
            path.write_bytes(data)
        ways: dict[str, Callable[[], Iterator[object]]] = {
            what: lambda processor=processor: iter(
                DataLoader(ByProcessor(paths, processor), batch_size=BATCH, num_workers=1, prefetch_factor=4)
            )
            for what, processor in processors.items()
        }
        ours = {"equal to Pillow": transform, "quick resize": replace(transform, exact=False)}
        for what, one in ours.items():
            ways[f"our loader, {what}"] = lambda one=one: _loader(folder, len(paths), one).batches(0, 10**6)
        for what, decoder in (("a GPU", "cpu"), ("nvJPEG", "nvjpeg")):
            ways[f"our worker, beside {what}"] = lambda decoder=decoder: _left_raw(
                folder, len(paths), transform, decoder
            )
        ways["tried: our worker as a thread"] = lambda: _thread(folder, len(paths), transform, KeptPages())
        ways["tried: the same with fresh pages"] = lambda: _thread(folder, len(paths), transform, None)
        found: dict[str, list[float]] = {what: [] for what in ways}
        for _ in range(ROUNDS):
            for what, way in ways.items():
                found[what].append(_images_per_cpu_second(way()))
        rates = {what: statistics.median(values) for what, values in found.items()}
    base = next(iter(rates.values()))
    return [
        {"part": "worker", "what": what, "value": rate, "unit": "images per CPU-second", "ratio": rate / base}
        for what, rate in rates.items()
    ]


def _micros(folder: Path, num_pictures: int, side: Side, decoder: Decoder, leaves_raw: bool) -> MicroBatches:
    return MicroBatches(
        source=_source(folder, num_pictures),
        sides=(side,),
        plan=Plan(num_records=NUM_RECORDS, seed=0, global_batch_size=BATCH, world_size=1),
        order=Order(seed=0, global_batch_size=BATCH, micro_batch_size=BATCH),
        reading=Reading(max_pixels=MAX_PIXELS, decoder=decoder),
        leaves_raw=leaves_raw,
    )


def _left_raw(
    folder: Path, num_pictures: int, transform: ImageTransform, decoder: Decoder
) -> Iterator[object]:
    """What is handed to a device that resizes."""
    micros = _micros(folder, num_pictures, _side(transform), decoder, leaves_raw=True)
    keys = [(step, 0) for step in range(NUM_RECORDS // BATCH)]
    return iter(DataLoader(micros, batch_size=None, sampler=keys, num_workers=1, prefetch_factor=4))


def _thread(
    folder: Path, num_pictures: int, transform: ImageTransform, pages: KeptPages | None
) -> Iterator[object]:
    """Nothing is handed over, but text and collation take the interpreter from the trainer."""
    side = _side(transform)
    micros = _micros(folder, num_pictures, side, "cpu", leaves_raw=False)
    with ThreadPoolExecutor(1) as thread:
        ahead = deque(thread.submit(micros.__getitem__, (step, 0)) for step in range(4))
        for step in range(4, NUM_RECORDS // BATCH):
            ahead.append(thread.submit(micros.__getitem__, (step, 0)))
            yield to_batch(ahead.popleft().result(), (side,), torch.device("cpu"), pages)


def _loader(folder: Path, num_pictures: int, transform: ImageTransform) -> Loader:
    return Loader(
        source=_source(folder, num_pictures),
        student=_side(transform),
        teacher=None,
        order=Order(seed=0, global_batch_size=BATCH, micro_batch_size=BATCH),
        reading=Reading(num_workers=1),
        device="cpu",
    )


def _side(transform: ImageTransform) -> Side:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER, local_files_only=True)
    return Side(
        tokenizer=tokenizer,
        template=TEMPLATES["vicuna"],
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tokens_per_image=729,
        transform=transform,
        max_length=2048,
    )


def _source(folder: Path, num_pictures: int) -> LlavaJson:
    path = folder / "data.json"
    asked = {"from": "human", "value": "<image>\nWhat colour is the large circle?"}
    answered = {"from": "gpt", "value": "The large circle is red, and the small one is blue."}
    path.write_text(
        json.dumps(
            [
                {"id": i, "image": f"{i % num_pictures}.jpg", "conversations": [asked, answered]}
                for i in range(NUM_RECORDS)
            ]
        )
    )
    return LlavaJson(path, folder, cache=folder / "cache")


def _images_per_cpu_second(batches: Iterator[object]) -> float:
    for _ in range(WARM_UP):
        next(batches)
    started = _cpu_seconds()
    for _ in range(MEASURED):
        next(batches)
    spent = _cpu_seconds() - started
    del batches
    return MEASURED * BATCH / spent


def _cpu_seconds() -> float:
    """Of this process and its workers."""
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])  # user and system, after the state
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")
