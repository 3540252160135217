"""Record lists: what a run reads of a source, known by its content, and refused for another source."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from data_samples import entry, write_dataset

from llava_kd.assembly.parts.data import make_source
from llava_kd.config import DataConfig, SourceConfig
from llava_kd.data.record_lists import Chosen, RecordList, read_lists, write_lists
from llava_kd.data.sources.llava_json import LlavaJson


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data", [entry(number) for number in range(6)])


def listed(path: Path, records: tuple[int, ...]) -> RecordList:
    source = LlavaJson(path, path.parent)
    return RecordList(
        name=path.name, fingerprint=source.fingerprint, num_records=len(source), records=records
    )


def test_a_run_reads_the_listed_records_in_order_with_ids_and_images(data: Path, tmp_path) -> None:
    write_lists(tmp_path / "list.json", [listed(data, (0, 3, 5))])
    whole = LlavaJson(data, data.parent)
    source = make_source(DataConfig(path=str(data), records=str(tmp_path / "list.json")))
    assert len(source) == 3
    for place, number in enumerate((0, 3, 5)):
        assert source.record(place) == whole.record(number)
        assert source.image_bytes(place, 0) == whole.image_bytes(number, 0)
        assert source.name_of(place) == "data.json"
    # Data workers are handed the source so.
    assert source.fingerprint == pickle.loads(pickle.dumps(source)).fingerprint


def test_what_is_listed_is_part_of_the_fingerprint(data: Path) -> None:
    source = LlavaJson(data, data.parent)
    prints = {Chosen(source, numbers).fingerprint for numbers in ((0, 1), (0, 2), (0, 1, 2), (2,))}
    assert len(prints | {source.fingerprint}) == 5


def test_a_mixture_takes_its_weights_of_what_is_listed(tmp_path: Path) -> None:
    paths = [
        write_dataset(tmp_path / name, [entry(n + first) for n in range(4)])
        for name, first in (("a", 0), ("b", 10))
    ]
    write_lists(tmp_path / "list.json", [listed(paths[1], (1, 2)), listed(paths[0], (0, 1, 3))])
    parts = [SourceConfig(path=str(paths[0])), SourceConfig(path=str(paths[1]), weight=2)]
    source = make_source(DataConfig(sources=parts, records=str(tmp_path / "list.json")))
    read = sorted(source.record(i).id for i in range(len(source)))
    assert read == sorted(["r0", "r1", "r3"] + 2 * ["r11", "r12"])


def test_a_bad_record_keeps_its_place_in_the_list(tmp_path: Path) -> None:
    entries = [entry(0), {"id": "bad", "conversations": []}, entry(2)]
    path = write_dataset(tmp_path / "data", entries)
    chosen = Chosen(LlavaJson(path, path.parent), (1, 2))
    assert chosen.faults == [0]


@pytest.mark.parametrize("records", [(), (1, 1), (2, 1), (-1, 2), (0, 6)])
def test_numbers_that_are_no_list_are_refused(data: Path, records: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"keeps no record|ascending order"):
        listed(data, records)


def test_a_list_of_other_data_is_refused_by_name(data: Path, tmp_path: Path) -> None:
    write_lists(tmp_path / "list.json", [listed(data, (0, 3))])
    data.write_text(data.read_text().replace("How many", "How few"))
    with pytest.raises(ValueError, match=r"written for other data than data\.json"):
        make_source(DataConfig(path=str(data), records=str(tmp_path / "list.json")))


def test_a_list_of_more_sources_than_the_data_is_refused(data: Path, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "other", [entry(number) for number in range(3)])
    write_lists(tmp_path / "list.json", [listed(data, (0,)), listed(other, (0,))])
    with pytest.raises(ValueError, match=r"also selects from data\.json"):
        make_source(DataConfig(path=str(data), records=str(tmp_path / "list.json")))


def spoilt(tree: dict) -> list[str]:
    number = json.dumps({**tree, "sources": [{**tree["sources"][0], "records": [0, 1]}]})
    return [
        "",
        "[",
        "[]",
        "{}",
        json.dumps({**tree, "format": 9}),
        json.dumps({**tree, "format": "1"}),
        number,
    ]


def test_a_damaged_list_is_refused_and_never_half_read(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    write_lists(path, [listed(data, (0, 3))])
    assert read_lists(path)[0].records == (0, 3)
    for text in spoilt(json.loads(path.read_text())):
        path.write_text(text)
        with pytest.raises(ValueError, match="not a readable record list"):
            read_lists(path)
    with pytest.raises(ValueError, match="no record list"):
        read_lists(tmp_path / "none.json")
