"""A folder, tar shards, Parquet and Arrow tables, and a mixture: the same records give the same batches."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from data_samples import encoded_image, entry, loader_of, side, write_dataset

from llava_kd.assembly.parts.data import make_source
from llava_kd.config import DataConfig
from llava_kd.data.batches.device_stage import tensors_of
from llava_kd.data.batches.packing import Packing
from llava_kd.data.sources.conversation import Source
from llava_kd.data.sources.llava_json import LlavaJson
from llava_kd.data.sources.mixture import Mixture
from llava_kd.data.sources.packed import PackedRecords
from llava_kd.data.sources.tables import Tables
from llava_kd.data.sources.tar_shards import TarShards

SIDE = side()
ENTRIES = [entry(i, images=i % 3, rounds=1 + i % 2) for i in range(12)]


@pytest.fixture
def folder(tmp_path: Path) -> LlavaJson:
    return LlavaJson(write_dataset(tmp_path, ENTRIES), tmp_path)


def images_of(raw: dict, root: Path) -> list[bytes]:
    names = raw.get("image", [])
    return [(root / name).read_bytes() for name in ([names] if isinstance(names, str) else names)]


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def write_tars(root: Path) -> list[Path]:
    paths = [root / f"shard-{s}.tar" for s in range(2)]
    for s, path in enumerate(paths):
        with tarfile.open(path, "w") as archive:
            for number, raw in list(enumerate(ENTRIES))[6 * s : 6 * s + 6]:
                images = images_of(raw, root)
                kept = {k: v for k, v in raw.items() if k != "image"}
                for k, data in enumerate(images):
                    kind = "png" if data.startswith(b"\x89PNG") else "jpg"
                    name = f"{number:04}.{kind}" if len(images) == 1 else f"{number:04}.{k}.{kind}"
                    add(archive, f"part/{name}", data)
                add(archive, f"part/{number:04}.json", json.dumps(kept).encode())
    return paths


def table_of(root: Path, *, with_paths: bool = True):
    pa = pytest.importorskip("pyarrow", reason="tables need the optional package pyarrow")
    rows = [
        {
            "id": raw["id"],
            "images": [{"bytes": d, "path": "x.jpg" if with_paths else None} for d in images_of(raw, root)],
            "conversations": raw["conversations"],
        }
        for raw in ENTRIES
    ]
    return pa.Table.from_pylist(rows)


def write_parquet(root: Path, *, with_paths: bool = True) -> list[Path]:
    table = table_of(root, with_paths=with_paths)
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(table.slice(0, 7), root / "a.parquet", row_group_size=3)
    pq.write_table(table.slice(7), root / "b.parquet")
    return [root / "a.parquet", root / "b.parquet"]


def write_arrow(root: Path, *, stream: bool) -> list[Path]:
    table = table_of(root)
    pa = pytest.importorskip("pyarrow")
    path = root / "data.arrow"
    opened = pa.ipc.new_stream if stream else pa.ipc.new_file
    with opened(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=5)
    return [path]


KINDS = {
    "tar": lambda root: TarShards(write_tars(root)),
    "tar, cached": lambda root: TarShards(write_tars(root), cache=root / "cache"),
    "json, cached": lambda root: LlavaJson(root / "data.json", root, cache=root / "cache"),
    "parquet": lambda root: Tables(write_parquet(root)),
    "parquet without paths": lambda root: Tables(write_parquet(root, with_paths=False)),
    "arrow stream": lambda root: Tables(write_arrow(root, stream=True)),
    "arrow file": lambda root: Tables(write_arrow(root, stream=False)),
    "mixture of one": lambda root: _in_order(LlavaJson(root / "data.json", root)),
}


def _in_order(source: Source) -> Mixture:
    mixture = Mixture([source], [1.0])
    mixture._numbers.sort()
    return mixture


def batches(source: Source) -> list:
    loader = loader_of(
        source=source,
        student=SIDE,
        teacher=None,
        seed=0,
        global_batch_size=6,
        micro_batch_size=3,
        rank=0,
        world_size=1,
        device="cpu",
    )
    return [batch for group in loader.batches(0, 3) for batch in group]


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_gives_the_batches_of_the_folder(folder: LlavaJson, tmp_path: Path, kind: str) -> None:
    source = KINDS[kind](tmp_path)
    for copy in (source, pickle.loads(pickle.dumps(source))):
        for one, other in zip(batches(copy), batches(folder), strict=True):
            assert one.record_ids == other.record_ids
            for a, b in zip(tensors_of(one), tensors_of(other), strict=True):
                assert torch.equal(a, b)
    assert source.fingerprint == KINDS[kind](tmp_path).fingerprint


def test_cached_records_are_mapped_and_not_copied(tmp_path: Path) -> None:
    path = write_dataset(tmp_path, ENTRIES)
    source = LlavaJson(path, tmp_path, cache=tmp_path / "cache")
    assert len(pickle.dumps(source)) < 1000
    path.write_text(json.dumps(ENTRIES[:3]))
    assert len(LlavaJson(path, tmp_path, cache=tmp_path / "cache")) == 3
    path.write_text(json.dumps(ENTRIES))
    again = LlavaJson(path, tmp_path, cache=tmp_path / "cache")
    assert [again.record(i) for i in range(12)] == [source.record(i) for i in range(12)]


def test_failed_build_leaves_no_cache(tmp_path: Path) -> None:
    path = write_dataset(tmp_path, [entry(0) | {"conversations": []}])
    for _ in range(2):
        with pytest.raises(ValueError, match="1 unusable records and no other"):
            LlavaJson(path, tmp_path, cache=tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]


def test_packed_records_keep_every_field(folder: LlavaJson) -> None:
    records = [folder.record(i) for i in range(12)]
    packed = PackedRecords.pack(records)
    assert [packed[i] for i in (5, 5, 0, 11)] == [records[i] for i in (5, 5, 0, 11)]


def test_more_than_nine_images_come_in_order(tmp_path: Path) -> None:
    raw = entry(0, images=12)
    data = [encoded_image(seed=k) for k in range(12)]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "r.json", json.dumps({"conversations": raw["conversations"]}).encode())
        for k in reversed(range(12)):
            add(archive, f"r.{k}.jpg", data[k])
    source = TarShards([tmp_path / "a.tar"])
    assert [source.image_bytes(0, k) for k in range(12)] == data
    assert source.record(0).id == "r"


def test_images_that_an_entry_names_come_in_its_order_and_no_others(tmp_path: Path) -> None:
    raw = entry(0, images=2)
    names = {"left": encoded_image(1), "right": encoded_image(2), "mask": encoded_image(3)}
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for key, images in (("a", ["x/a.right.png", "a.left.png"]), ("b", ["coco/1.png", "coco/2.png"])):
            for name, data in list(names.items())[: 3 if key == "a" else 2]:
                add(archive, f"{key}.{name}.png", data)
            add(archive, f"{key}.json", json.dumps(raw | {"image": images}).encode())
    source = TarShards([tmp_path / "a.tar"])
    assert source.faults == ()
    assert [source.image_bytes(0, k) for k in range(2)] == [names["right"], names["left"]]
    assert [source.image_bytes(1, k) for k in range(2)] == [names["left"], names["right"]]


def test_bad_records_of_a_shard_keep_their_places(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "r.jpg", encoded_image())
        add(archive, "s.json", b"{")
        add(archive, "t.json", json.dumps(entry(0, images=0)).encode())
        add(archive, "u.json", b"{}")
        add(archive, "u.png", encoded_image(kind="PNG"))
        add(archive, "v.txt", b"a caption of nothing")
    source = TarShards([tmp_path / "a.tar"])
    assert (len(source), source.faults) == (5, (0, 1, 3, 4))
    for i, reason in (
        (0, "record 'r': of a.tar has no .json and no .txt"),
        (1, "record 's': of a.tar has a .json that is not JSON"),
        (3, "record 'u': of a.tar has no conversations and no caption"),
        (4, "record 'v': of a.tar has a caption but no image"),
    ):
        assert reason in source.record(i).fault
    assert source.record(2) == LlavaJson(write_dataset(tmp_path, [entry(0, images=0)]), tmp_path).record(0)
    (tmp_path / "b.tar").write_bytes(b"no tar file at all")
    with pytest.raises(ValueError, match=r"b.tar is not a whole, uncompressed tar file"):
        TarShards([tmp_path / "b.tar"])
    with pytest.raises(ValueError, match="no tar shard"):
        TarShards([tmp_path / "c.tar"])


def test_captions_beside_pictures_are_records(tmp_path: Path) -> None:
    """As img2dataset writes shards; a .txt goes before the caption of the .json, which may be cut."""
    images = [encoded_image(seed=k) for k in range(3)]
    with tarfile.open(tmp_path / "00000.tar", "w") as archive:
        for k, image in enumerate(images):
            add(archive, f"{k:09}.jpg", image)
            if k != 1:
                add(archive, f"{k:09}.txt", f"picture {k}\n".encode())
            if k != 2:
                add(archive, f"{k:09}.json", json.dumps({"caption": f"picture {k}", "url": "u"}).encode())
    source = TarShards([tmp_path / "00000.tar"])
    assert not source.faults
    for k, image in enumerate(images):
        turns = [(turn.role, turn.text) for turn in source.record(k).turns]
        assert turns == [("user", "<image>"), ("assistant", f"picture {k}")]
        assert source.record(k).id == f"{k:09}"
        assert source.image_bytes(k, 0) == image


def test_files_of_a_record_in_two_places_are_no_record(tmp_path: Path) -> None:
    """A shard that is not sorted: without its image, the text would be trained on alone."""
    talk = json.dumps({"conversations": entry(0, images=0)["conversations"]}).encode()
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name, data in (("a.jpg", encoded_image()), ("b.json", talk), ("a.json", talk)):
            add(archive, name, data)
    source = TarShards([tmp_path / "0.tar"])
    assert list(source.faults) == [0, 2]
    assert "sort them by name" in source.record(2).fault


def test_hidden_files_of_a_shard_are_not_read_and_dots_in_names_are_explained(tmp_path: Path) -> None:
    """tar of macOS writes `._NAME` beside each file that has attributes."""
    talk = json.dumps(entry(0)).encode()
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name, data in (("d/a.jpg", encoded_image()), ("d/._a.jpg", b"x"), ("d/a.json", talk)):
            add(archive, name, data)
        add(archive, "d/b.v1.json", talk)
    source = TarShards([tmp_path / "0.tar"])
    assert list(source.faults) == [1]
    assert source.record(0).images == ("d/a.jpg",)
    assert "ends at its first dot, so write it without dots" in source.record(1).fault


def test_bad_rows_of_a_table_keep_their_places(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="tables need the optional package pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    table = table_of(write_dataset(tmp_path, ENTRIES).parent)
    talks = table.column("conversations").to_pylist()
    talks[2], talks[5] = None, [{"from": "human", "value": "?"}, {"from": "gpt", "value": ""}]
    table = table.set_column(2, "conversations", pa.array(talks))
    ids = table.column("id").to_pylist()
    broken = pa.array([name.encode() if k != 7 else b"\xff" for k, name in enumerate(ids)]).view(pa.string())
    table = table.set_column(0, "id", broken)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    source = Tables([tmp_path / "a.parquet"])
    assert source.faults == (2, 5, 7)
    for i, reason in ((2, "no conversations"), (5, "empty answer"), (7, "row 3 of its group cannot be read")):
        assert reason in source.record(i).fault
    folder = LlavaJson(tmp_path / "data.json", tmp_path)
    for i in {*range(12)} - {2, 5, 7}:
        assert source.record(i).turns == folder.record(i).turns


def test_bad_records_are_left_out_of_the_loss_and_named(tmp_path: Path) -> None:
    path = write_dataset(tmp_path, ENTRIES)
    spoilt = json.loads(path.read_text())
    spoilt[4]["conversations"][1]["value"] = ""
    path.write_text(json.dumps(spoilt))
    for packing in (None, Packing(max_tokens=300, max_images=8)):
        source = LlavaJson(path, tmp_path)
        loader = loader_of(
            source=source, student=SIDE, teacher=None, seed=0, global_batch_size=4, micro_batch_size=2,
            rank=0, world_size=1, device="cpu", max_bad_rate=0.1, bad_records_path=tmp_path / "bad.jsonl",
            packing=packing,
        )  # fmt: skip
        for _ in loader.batches(0, loader.steps_per_epoch):
            pass
        named = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
        assert {line["id"] for line in named} == {"r4"}
        assert named[0]["reason"] == "record 'r4': turn 1 is an empty answer"


def test_more_bad_records_than_allowed_stop_a_run_before_it_reads(tmp_path: Path) -> None:
    path = write_dataset(tmp_path, ENTRIES)
    spoilt = json.loads(path.read_text())
    for k in range(4):
        spoilt[k]["conversations"][1]["value"] = ""
    path.write_text(json.dumps(spoilt))
    with pytest.raises(
        ValueError, match=r"4 of the 12 records are bad, more than max_bad_rate 0\.1"
    ) as error:
        make_source(DataConfig(path=str(path), max_bad_rate=0.1))
    assert "data.json: r3: record 'r3': turn 1 is an empty answer" in str(error.value)
    assert "--write_sound" in str(error.value)
    assert len(make_source(DataConfig(path=str(path), max_bad_rate=0.4))) == 12


def test_mixture_reads_each_source_by_its_weight(tmp_path: Path) -> None:
    sources = []
    for name, count in (("a", 10), ("b", 4), ("c", 20)):
        entries = [entry(i, images=0) | {"id": f"{name}{i}"} for i in range(count)]
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(entries))
        sources.append(LlavaJson(path, tmp_path))
    mixture = Mixture(sources, [1.0, 2.5, 0.3])
    ids = Counter(mixture.record(i).id for i in range(len(mixture)))
    assert Counter(name[0] for name in ids.elements()) == {"a": 10, "b": 10, "c": 6}
    assert all(ids[f"a{i}"] == 1 for i in range(10))
    assert all(ids[f"b{i}"] in (2, 3) for i in range(4))
    assert max(ids[f"c{i}"] for i in range(20)) == 1
    assert {mixture.name_of(i) for i in range(len(mixture))} == {"a.json", "b.json", "c.json"}
    assert Mixture(sources, [1.0, 2.5, 0.4]).fingerprint != mixture.fingerprint


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -1.0]])
def test_bad_weights_are_errors(folder: LlavaJson, weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weight"):
        Mixture([folder, folder], weights)
