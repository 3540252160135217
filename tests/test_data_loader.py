"""The order of records, bad records, both sides of a batch, and workers."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from data_samples import encoded_image, entry, llama_like, loader_of, qwen_like, side, write_dataset

from llava_kd.batch import IGNORE_INDEX, Batch
from llava_kd.data.batches.loader import Loader, Side
from llava_kd.data.sources.llava_json import LlavaJson

SIDE = side()


@pytest.fixture
def source(tmp_path: Path) -> LlavaJson:
    entries = [entry(i, images=i % 3, rounds=1 + i % 2) for i in range(20)]
    return LlavaJson(write_dataset(tmp_path, entries), tmp_path)


def make_loader(source: LlavaJson, **changes: object) -> Loader:
    settings: dict = {
        "source": source,
        "student": SIDE,
        "teacher": None,
        "seed": 0,
        "global_batch_size": 8,
        "micro_batch_size": 3,
        "rank": 0,
        "world_size": 1,
        "device": "cpu",
    }
    return loader_of(**(settings | changes))


def ids(groups: list[list[Batch]]) -> list[list[tuple[str, ...]]]:
    return [[batch.record_ids for batch in group] for group in groups]


def flat(groups: list[list[Batch]]) -> list[str]:
    return [name for group in groups for batch in group for name in batch.record_ids]


def assert_equal(one: Batch, other: Batch) -> None:
    assert one.record_ids == other.record_ids
    for a, b in ((one.student, other.student), (one.teacher, other.teacher)):
        if a is None or b is None:
            assert a is b
            continue
        for name, value in vars(a).items():
            assert torch.equal(value, vars(b)[name]) if isinstance(value, torch.Tensor) else True, name


def test_a_step_is_cut_into_micro_batches(source: LlavaJson) -> None:
    groups = list(make_loader(source).batches(0, 2))
    assert [[len(names) for names in group] for group in ids(groups)] == [[3, 3, 2], [3, 3, 2]]


def test_every_record_comes_once_per_epoch_and_epochs_differ(source: LlavaJson) -> None:
    loader = make_loader(source)
    assert loader.steps_per_epoch == 3
    names = flat(list(loader.batches(0, 5)))
    first, second = names[:20], names[20:40]
    assert sorted(first) == sorted(second) == sorted(f"r{i}" for i in range(20))
    assert first != second


def test_seed_decides_the_order(source: LlavaJson) -> None:
    orders = [flat(list(make_loader(source, seed=seed).batches(0, 2))) for seed in (0, 0, 1)]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]


def test_resuming_twice_gives_the_same_batches(source: LlavaJson) -> None:
    whole = list(make_loader(source).batches(0, 6))
    pieces = [batch for cut in ((0, 1), (1, 4), (4, 6)) for batch in make_loader(source).batches(*cut)]
    for one, other in zip(whole, pieces, strict=True):
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)


def test_ranks_share_the_records_of_a_step(source: LlavaJson) -> None:
    alone = list(make_loader(source).batches(0, 4))
    ranks = [list(make_loader(source, rank=rank, world_size=2).batches(0, 4)) for rank in range(2)]
    for step in range(4):
        together = [flat([ranks[rank][step]]) for rank in range(2)]
        assert len(together[0]) == len(together[1])
        assert sorted(together[0] + together[1]) == sorted(flat([alone[step]]))


def test_global_batch_must_divide_over_the_ranks(source: LlavaJson) -> None:
    with pytest.raises(
        ValueError, match=r"global batch \(8 rows\) must be a multiple of the number of ranks \(3\)"
    ):
        make_loader(source, world_size=3)


def test_workers_give_the_same_batches(source: LlavaJson) -> None:
    alone = list(make_loader(source).batches(1, 4))
    for num_workers in (1, 2):
        others = list(make_loader(source, num_workers=num_workers).batches(1, 4))
        for one, other in zip(alone, others, strict=True):
            for a, b in zip(one, other, strict=True):
                assert_equal(a, b)


def test_images_kept_in_memory_are_read_once_and_give_the_same_batches(
    source: LlavaJson, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = list(make_loader(source).batches(0, 4))
    loader = make_loader(source, image_cache_bytes=2**20)
    assert [len(group) for group in loader.batches(0, 2)]
    one_epoch = list(loader.batches(0, 4))
    reads: list[int] = []
    monkeypatch.setattr(type(source), "image_bytes", lambda self, i, k: reads.append(i))
    again = list(loader.batches(0, 4))
    assert not reads
    for groups in (one_epoch, again):
        for group, other in zip(expected, groups, strict=True):
            for one, two in zip(group, other, strict=True):
                assert_equal(one, two)


def test_rows_are_padded_to_the_right(source: LlavaJson) -> None:
    (batch,) = next(make_loader(source, micro_batch_size=8).batches(0, 1))
    inputs = batch.student
    lengths = (inputs.segment_ids_BT > 0).sum(1)
    assert inputs.input_ids_BT.shape[1] == lengths.max()
    for b, length in enumerate(lengths.tolist()):
        assert inputs.segment_ids_BT[b, :length].eq(1).all()
        assert inputs.position_ids_BT[b, :length].tolist() == list(range(length))
        assert inputs.labels_BT[b, length:].eq(IGNORE_INDEX).all()
    assert not inputs.is_packed
    assert int(inputs.visual_BT.sum()) == 4 * inputs.num_images
    assert inputs.pixels_ICHW.dtype == torch.float32
    assert inputs.pixels_ICHW.shape[1:] == (3, 24, 24)


def test_pixels_come_in_the_order_of_their_places(source: LlavaJson) -> None:
    """Each record alone gives the same pixels as its part of a batch."""
    (batch,) = next(make_loader(source, micro_batch_size=8).batches(0, 1))
    singles = [b for group in make_loader(source, micro_batch_size=1).batches(0, 1) for b in group]
    assert [name for b in singles for name in b.record_ids] == list(batch.record_ids)
    torch.testing.assert_close(batch.student.pixels_ICHW, torch.cat([b.student.pixels_ICHW for b in singles]))


def test_text_only_batch_has_no_pixels(tmp_path: Path) -> None:
    source = LlavaJson(write_dataset(tmp_path, [entry(i, images=0) for i in range(8)]), tmp_path)
    (batch,) = next(make_loader(source, micro_batch_size=8).batches(0, 1))
    assert batch.student.pixels_ICHW.shape == (0, 3, 24, 24)
    assert batch.counts()["images"] == 0
    assert batch.counts()["response_tokens"] > 0


def spoilt(tmp_path: Path, content: bytes | None, *, count: int = 1, records: int = 8) -> LlavaJson:
    """A source whose first images are replaced by `content`, or deleted."""
    entries = [entry(i) for i in range(records)]
    path = write_dataset(tmp_path, entries)
    for raw in entries[:count]:
        if content is None:
            (tmp_path / raw["image"]).unlink()
        else:
            (tmp_path / raw["image"]).write_bytes(content)
    return LlavaJson(path, tmp_path)


def bomb(kind: str) -> bytes:
    """A small file whose header promises 60,000 x 60,000 pixels."""
    data = bytearray(encoded_image(kind=kind))
    if kind == "JPEG":
        start = data.index(b"\xff\xc0") + 5  # marker, length, precision; then height and width
        data[start : start + 4] = struct.pack(">HH", 60_000, 60_000)
    else:
        data[16:24] = struct.pack(">II", 60_000, 60_000)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


BAD_IMAGES = {
    "JPEG bomb": (bomb("JPEG"), "at most 89478485 pixels, got (60000 x 60000|3600000000)"),
    "PNG bomb": (bomb("PNG"), "at most 89478485 pixels, got (60000 x 60000|3600000000)"),
    "missing": (None, "is missing"),
    "empty": (b"", "is empty"),
    "cut": (encoded_image(80, 90)[:900], "damaged"),
    "no image": (b"hello", "not a readable image"),
}


@pytest.mark.parametrize(("content", "reason"), BAD_IMAGES.values(), ids=BAD_IMAGES.keys())
def test_bad_image_keeps_its_place_and_is_named(tmp_path: Path, content: bytes | None, reason: str) -> None:
    listing = tmp_path / "run" / "bad_records.jsonl"
    loader = make_loader(
        spoilt(tmp_path, content), micro_batch_size=8, max_bad_rate=0.5, bad_records_path=listing
    )
    good = make_loader(spoilt(tmp_path / "good", None, count=0), micro_batch_size=8)
    (batch,), (sound,) = next(loader.batches(0, 1)), next(good.batches(0, 1))
    row = batch.record_ids.index("r0")
    assert torch.equal(batch.student.input_ids_BT, sound.student.input_ids_BT)
    assert batch.student.labels_BT[row].eq(IGNORE_INDEX).all()
    others = [b for b in range(8) if b != row]
    assert torch.equal(batch.student.labels_BT[others], sound.student.labels_BT[others])
    assert batch.student.image_is_valid_I.tolist() == [b != row for b in range(8)]
    assert batch.student.pixels_ICHW[row].unique().numel() == 1
    assert batch.counts()["images"] == 7
    (line,) = [json.loads(text) for text in listing.read_text().splitlines()]
    assert line["id"] == "r0"
    assert re.search(reason, line["reason"])
    assert "BytesIO" not in line["reason"]
    assert line["source"] == "data.json"
    assert loader.telemetry()["bad_records"] == 1


def test_one_bad_image_of_several_masks_the_record(tmp_path: Path) -> None:
    entries = [entry(0, images=2)]
    path = write_dataset(tmp_path, entries)
    (tmp_path / entries[0]["image"][1]).unlink()
    source = LlavaJson(path, tmp_path)
    ((batch,),) = list(make_loader(source, global_batch_size=1).batches(0, 1))
    assert batch.student.image_is_valid_I.tolist() == [False, False]
    assert batch.student.pixels_ICHW[0].unique().numel() > 1


def test_record_that_cannot_be_encoded_keeps_a_place_without_targets(tmp_path: Path) -> None:
    source = spoilt(tmp_path, None, count=0)
    short = replace(SIDE, max_length=10)
    loader = make_loader(source, student=short, micro_batch_size=8, max_bad_rate=1.0)
    (batch,) = next(loader.batches(0, 1))
    assert batch.counts()["response_tokens"] == 0
    assert batch.student.pixels_ICHW.shape[0] == 0
    assert loader.telemetry()["bad_records"] == 8


def test_run_stops_with_the_list_past_the_rate(tmp_path: Path) -> None:
    source = spoilt(tmp_path, b"", count=4)
    with pytest.raises(ValueError, match=r"4 of the \d records read are bad") as error:
        list(make_loader(source, max_bad_rate=0.1).batches(0, 1))
    assert "r3: image 'images/3_0.png': the image file is empty" in str(error.value)


def test_three_bad_records_do_not_stop_a_tiny_run(tmp_path: Path) -> None:
    source = spoilt(tmp_path, b"", count=3)
    assert len(list(make_loader(source, max_bad_rate=0.001).batches(0, 1))) == 1


def test_rate_of_zero_stops_at_the_first_bad_record(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 of the "):
        list(make_loader(spoilt(tmp_path, b"", count=1), max_bad_rate=0.0).batches(0, 1))


def test_rate_is_counted_over_an_epoch_at_least(tmp_path: Path) -> None:
    source = spoilt(tmp_path, b"", count=6, records=40)
    loader = make_loader(source, max_bad_rate=0.15, global_batch_size=40)
    assert len(list(loader.batches(0, 1))) == 1
    with pytest.raises(ValueError, match="are bad"):
        list(make_loader(source, max_bad_rate=0.12, global_batch_size=40).batches(0, 1))


def test_teacher_reads_with_its_own_size_and_places(source: LlavaJson) -> None:
    teacher = side(tokenizer=SIDE.tokenizer, tokens_per_image=9, size=30)
    (batch,) = next(make_loader(source, teacher=teacher, micro_batch_size=8).batches(0, 1))
    assert batch.teacher is not None
    assert batch.teacher.pixels_ICHW.shape[2:] == (30, 30)
    assert int(batch.teacher.visual_BT.sum()) == 9 * batch.teacher.num_images
    assert batch.student.num_images == batch.teacher.num_images
    for b in range(8):
        targets = [i.labels_BT[b][i.labels_BT[b] != IGNORE_INDEX] for i in (batch.student, batch.teacher)]
        assert torch.equal(*targets)


def test_truncation_on_one_side_takes_the_targets_of_both(source: LlavaJson) -> None:
    teacher = side(tokenizer=SIDE.tokenizer, tokens_per_image=30, max_length=90)
    loader = make_loader(source, teacher=teacher, global_batch_size=20, max_bad_rate=1.0, micro_batch_size=20)
    (batch,) = next(loader.batches(0, 1))
    assert batch.teacher is not None
    counts = [(i.labels_BT != IGNORE_INDEX).sum(1).tolist() for i in (batch.student, batch.teacher)]
    assert counts[0] == counts[1]
    assert loader.telemetry()["truncated_records"] > 0


def test_sides_that_answer_in_different_tokens_are_named(source: LlavaJson) -> None:
    teacher = side(tokenizer=llama_like())
    with pytest.raises(ValueError, match="must read the same answer tokens"):
        list(make_loader(source, teacher=teacher, global_batch_size=20).batches(0, 1))


def test_telemetry_starts_again_at_each_call(source: LlavaJson) -> None:
    loader = make_loader(source)
    list(loader.batches(0, 1))
    first = loader.telemetry()
    assert first["records"] == 8
    assert first["images"] > 0
    assert first["tokens"] <= first["token_places"]
    assert first["data_wait_s"] > 0
    assert loader.telemetry()["records"] == 0


def _other(name: str, source: LlavaJson, tmp_path: Path) -> Loader:
    if name == "seed":
        return make_loader(source, seed=1)
    if name == "source":
        path = tmp_path / "other.json"
        path.write_text(json.dumps([entry(3)]))
        return make_loader(LlavaJson(path, tmp_path))
    changed: dict[str, Side] = {
        "template": side(template="chatml"),
        "tokenizer": side(tokenizer=llama_like()),
        "length": replace(SIDE, max_length=99),
        "size": side(size=25),
    }
    return make_loader(source, student=changed[name])


@pytest.mark.parametrize("name", ["seed", "source", "template", "tokenizer", "length", "size"])
def test_fingerprint_follows_what_decides_the_batches(source: LlavaJson, tmp_path: Path, name: str) -> None:
    assert _other(name, source, tmp_path).fingerprint != make_loader(source).fingerprint


def test_fingerprint_is_the_same_in_another_run(source: LlavaJson) -> None:
    assert (
        make_loader(source, student=side(tokenizer=qwen_like())).fingerprint
        == make_loader(source).fingerprint
    )


class _Deadly:
    """A source whose worker is killed when it opens an image, as by a machine that is out of memory."""

    def __init__(self, source: LlavaJson) -> None:
        self._source = source
        self.record, self.name_of = source.record, source.name_of
        self.fingerprint = source.fingerprint

    def __len__(self) -> int:
        return len(self._source)

    def image_bytes(self, i: int, k: int) -> bytes:
        os.kill(os.getpid(), signal.SIGKILL)
        return b""


def test_killed_worker_is_a_clear_error(source: LlavaJson) -> None:
    loader = make_loader(_Deadly(source), num_workers=1)
    with pytest.raises(RuntimeError, match=r"a data worker process died .* lower data.num_workers"):
        next(loader.batches(0, 1))
