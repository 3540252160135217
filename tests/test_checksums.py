"""Every file that a cache or a resume reads is under a checksum: a flipped bit is named, or does no harm."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import entry, write_dataset

from llava_kd.assembly.runs.provenance import read_run
from llava_kd.checksums import sealed
from llava_kd.cli import main
from llava_kd.data.sources.cache import build_once
from llava_kd.data.sources.llava_json import LlavaJson
from llava_kd.data.teacher_store.shards import DamagedShardError, Shard, StoredRecord, write_shard
from llava_kd.data.teacher_store.store import INDEX, MANIFEST, Manifest, TeacherCache

HEAD = "head.safetensors"


def flipped(path: Path, count: int) -> Iterator[int]:
    """Flip one bit after the other, and back; their numbers."""
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for bit in rng.choice(8 * len(whole), min(count, 8 * len(whole)), replace=False).tolist():
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        yield bit
    path.write_bytes(whole)


def refusal(read: Callable[[], object]) -> str:
    """What is said where something is refused; nothing where it is read."""
    try:
        read()
    except (ValueError, DamagedShardError) as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache") / "hidden"


@pytest.fixture
def cache(stage: Callable[..., Path], directory: Path, tmp_path: Path) -> Path:
    """A teacher cache to be spoilt."""
    if not directory.exists():
        assert main(["cache-teacher", str(stage("writer")), f"--out={directory}"]) == 0
    return Path(shutil.copytree(directory, tmp_path / "cache"))


@pytest.mark.parametrize("name", [HEAD, INDEX, MANIFEST])
def test_a_flipped_bit_of_a_teacher_cache_is_refused_by_name(cache: Path, name: str) -> None:
    before = Manifest.read(cache)
    for bit in flipped(cache / name, 300):
        said = refusal(lambda: TeacherCache(cache, ("response",)).manifest.check(cache, HEAD))
        assert name in said or (name == MANIFEST and Manifest.read(cache) == before), bit  # a space changed


def test_of_a_damaged_manifest_nothing_is_advised_to_be_removed(cache: Path, stage, capsys) -> None:
    """The folder may be another than the cache's, and its shards are whole."""
    (cache / MANIFEST).write_text("{")
    for words in (
        ["train", str(stage("run", max_steps=1)), f"--teacher.cache={cache}"],
        ["cache-teacher", str(stage("writer")), f"--out={cache}"],
    ):
        assert main(words) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert f"{cache / MANIFEST} is not a readable manifest" in said
        assert "write the cache into a new directory" in said
        assert "; remove" not in said
    new = cache.with_name("new")
    assert main(["cache-teacher", str(stage("writer")), f"--out={new}"]) == 0
    assert main(["train", str(stage("run", max_steps=1)), f"--teacher.cache={new}"]) == 0


def test_training_looks_at_the_head_and_the_index(cache: Path, stage, capsys) -> None:
    words = ["train", str(stage("run", max_steps=1)), f"--teacher.cache={cache}"]
    for name in (HEAD, INDEX):
        for _ in flipped(cache / name, 2):
            assert main(words) == 2
            said = capsys.readouterr().err
            assert f"{cache / name} has another checksum than when it was written; the same" in said


def test_a_cache_of_a_version_without_checksums_is_read_and_it_is_said(cache: Path, stage, capsys) -> None:
    tree = json.loads((cache / MANIFEST).read_text())
    old = {name: value for name, value in tree.items() if name not in ("checksum", "checksums")}
    (cache / MANIFEST).write_text(json.dumps({**old, "format": 1}))
    config = stage("run", max_steps=1)
    assert main(["train", str(config), f"--teacher.cache={cache}"]) == 0
    assert "has no checksums of its head and index" in capsys.readouterr().err
    assert main(["cache-teacher", str(config), f"--out={cache}"]) == 0
    assert Manifest.read(cache).checksums.keys() == {HEAD, INDEX}


def test_a_flipped_bit_of_a_shard_is_named(tmp_path: Path) -> None:
    rows = torch.arange(12, dtype=torch.float32).view(3, 4)
    records = [
        StoredRecord(
            number=k, text_crc=9 * k, positions_M=torch.arange(3).int(), tensors={"hidden_ME": rows + k}
        )
        for k in range(2)
    ]
    path = write_shard(tmp_path, records)
    for bit in flipped(path, 2000):
        if said := refusal(lambda: Shard(path).check()):
            assert path.name in said, bit
            continue
        found = [Shard(path).record(r) for r in range(2)]
        for one, other in zip(records, found, strict=True):  # a space of the header
            assert (one.number, one.text_crc, one.crc()) == (other.number, other.text_crc, other.crc()), bit
            assert one.tensors.keys() == other.tensors.keys()


def test_a_damaged_cache_of_records_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_dataset(tmp_path, [entry(k) for k in range(4)])
    before = LlavaJson(path, tmp_path)
    LlavaJson(path, tmp_path, cache=tmp_path / "cache")
    (folder,) = (p for p in (tmp_path / "cache").iterdir() if p.is_dir())
    for name in ("records.bin", "offsets.npy", "checksums.json"):
        for bit in flipped(folder / name, 40):
            caplog.clear()
            again = LlavaJson(path, tmp_path, cache=tmp_path / "cache")
            assert [again.record(i) for i in range(4)] == [before.record(i) for i in range(4)], bit
            assert f"the cache {folder} is built again: " in caplog.text, bit
    (folder / "offsets.npy").unlink()
    assert len(LlavaJson(path, tmp_path, cache=tmp_path / "cache")) == 4


def test_a_whole_cache_is_not_made_again(tmp_path: Path) -> None:
    made = []

    def build(folder: Path) -> None:
        made.append(folder)
        (folder / "a").write_text("a")

    for _ in range(2):
        assert (build_once(tmp_path / "c", build) / "a").read_text() == "a"
    assert len(made) == 1


def test_a_flipped_bit_of_what_a_run_says_of_itself_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    record = {
        "completed": True,
        "steps": 12,
        "parent": None,
        "config": "max_steps: 12\n",
        "model": {"a": "0f"},
    }
    path.write_text(json.dumps(sealed(record), indent=2))
    before = read_run(path)
    for bit in flipped(path, 10**6):
        said = refusal(lambda: read_run(path))
        assert f"{path} is damaged" in said or read_run(path) == before, bit
    path.write_text(json.dumps(record))
    assert read_run(path) == record
