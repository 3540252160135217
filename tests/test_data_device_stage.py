"""Images resized after the hand-over equal those resized by the worker, on every device."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from data_samples import entry, loader_of, micros_of, side, write_dataset

from llava_kd.batch import Batch
from llava_kd.data.batches.collate import RawImages
from llava_kd.data.batches.device_stage import Ahead, tensors_of, to_batch
from llava_kd.data.batches.loader import Loader
from llava_kd.data.batches.micro_batches import Micro, MicroBatches
from llava_kd.data.batches.plan import Plan
from llava_kd.data.sources.llava_json import LlavaJson

STUDENT = side()
TEACHER = side(tokenizer=STUDENT.tokenizer, tokens_per_image=9, size=30)


@pytest.fixture
def source(tmp_path: Path) -> LlavaJson:
    entries = [entry(i, images=i % 3) for i in range(16)]
    path = write_dataset(tmp_path, entries)
    (tmp_path / entries[1]["image"]).unlink()
    return LlavaJson(path, tmp_path)


def micro_batches(source: LlavaJson, *, leaves_raw: bool) -> MicroBatches:
    return micros_of(
        source=source,
        sides=(STUDENT, TEACHER),
        plan=Plan(num_records=len(source), seed=0, global_batch_size=8, world_size=1),
        micro_batch_size=4,
        rank=0,
        max_pixels=10**6,
        leaves_raw=leaves_raw,
    )


def assert_equal(one: Batch, other: Batch) -> None:
    assert one.record_ids == other.record_ids
    for a, b in zip(tensors_of(one), tensors_of(other), strict=True):
        assert torch.equal(a.cpu(), b.cpu())


def check_device(source: LlavaJson, device: torch.device) -> None:
    raw, resized = micro_batches(source, leaves_raw=True), micro_batches(source, leaves_raw=False)
    for key in ((0, 0), (0, 1), (1, 0)):
        one = to_batch(raw[key], (STUDENT, TEACHER), device)
        other = to_batch(resized[key], (STUDENT, TEACHER), torch.device("cpu"))
        assert_equal(one, other)


def test_raw_images_give_the_batch_of_resized_ones(source: LlavaJson) -> None:
    check_device(source, torch.device("cpu"))


def test_raw_images_are_one_block(source: LlavaJson) -> None:
    images = [torch.randint(0, 256, (h, w, 3), dtype=torch.uint8) for h, w in ((2, 3), (1, 1), (5, 4))]
    raw = RawImages.of(images)
    assert raw.pixels.shape == (3 * (6 + 1 + 20),)
    assert all(torch.equal(a, b) for a, b in zip(raw.images(torch.device("cpu")), images, strict=True))
    assert RawImages.of([]).images(torch.device("cpu")) == []


@pytest.mark.gpu
def test_gpu_gives_the_batches_of_the_cpu(source: LlavaJson) -> None:
    check_device(source, torch.device("cuda"))


@pytest.mark.gpu
def test_side_stream_gives_the_batches_in_order(source: LlavaJson) -> None:
    sides = (STUDENT, TEACHER)
    keys = [(step, m) for step in range(20) for m in range(2)]
    raw, resized = micro_batches(source, leaves_raw=True), micro_batches(source, leaves_raw=False)
    stream = Ahead(torch.device("cuda"))
    for _ in range(2):
        made = stream.run((raw[key] for key in keys), sides)
        for key, (_, batch) in zip(keys, made, strict=True):
            torch.randn(2000, 2000, device="cuda").square_()  # memory that the next batch could overwrite
            assert_equal(batch, to_batch(resized[key], sides, torch.device("cpu")))


@pytest.mark.gpu
def test_loader_on_a_gpu_gives_the_batches_of_the_cpu(source: LlavaJson) -> None:
    settings: dict = {
        "source": source,
        "student": STUDENT,
        "teacher": TEACHER,
        "seed": 0,
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "rank": 0,
        "world_size": 1,
    }
    on_gpu, on_cpu = loader_of(device="cuda", **settings), loader_of(device="cpu", **settings)
    for one, other in zip(on_gpu.batches(0, 3), on_cpu.batches(0, 3), strict=True):
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)


def test_batches_are_made_while_the_one_before_is_used(source: LlavaJson) -> None:
    micros = micro_batches(source, leaves_raw=False)
    asked: list[tuple[int, int]] = []
    third = threading.Event()

    def made() -> Iterator[Micro]:
        for key in [(step, m) for step in range(4) for m in range(2)]:
            asked.append(key)
            if len(asked) == 3:
                third.set()
            yield micros[key]

    batches = Ahead(torch.device("cpu")).run(made(), (STUDENT, TEACHER))
    next(batches)
    assert third.wait(timeout=30)
    time.sleep(0.5)
    assert len(asked) == 3  # two ahead, not all
    batches.close()  # pyright: ignore[reportAttributeAccessIssue]


def test_workers_end_with_the_batches_and_with_an_error(source: LlavaJson) -> None:
    def loader(**settings) -> Loader:
        return loader_of(
            source=source, student=STUDENT, teacher=TEACHER, seed=0, global_batch_size=4, micro_batch_size=4,
            rank=0, world_size=1, device="cpu", num_workers=1, **settings,
        )  # fmt: skip

    others = set(multiprocessing.active_children())  # of other tests, such as a server of commands

    def workers() -> set[multiprocessing.process.BaseProcess]:
        return set(multiprocessing.active_children()) - others

    batches = loader(max_bad_rate=1.0).batches(0, 1000)
    next(batches)
    assert len(workers()) == 1
    batches.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert not workers()
    with pytest.raises(ValueError, match="bad") as held:
        list(loader(max_bad_rate=0.0).batches(0, 1000))
    assert not workers()
    assert held.traceback  # which keeps alive what the failed call had
