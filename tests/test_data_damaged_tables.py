"""Damaged Arrow and Parquet files are refused by name: no crash of the process, no rows lost in silence."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from llava_kd.data.sources.tables import Tables

pa = pytest.importorskip("pyarrow", reason="tables need the optional package pyarrow")
pq = pytest.importorskip("pyarrow.parquet", reason="tables need the optional package pyarrow")
READ, NAMED, LOST, UNNAMED = range(4)
ROWS = 12


def write(path: Path, kind: str) -> bytes:
    rows = [
        {
            "id": f"r{k}",
            "images": [{"bytes": bytes([k]) * 50, "path": "x.jpg"}],
            "conversations": [
                {"from": "human", "value": f"<image>\nWhat is number {k}?"},
                {"from": "gpt", "value": "A picture."},
            ],
        }
        for k in range(ROWS)
    ]
    table = pa.Table.from_pylist(rows)
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=4)
    else:
        with (pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file)(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=5)
    return path.read_bytes()


def read_all(path: Path) -> int:
    """What becomes of reading every record and picture."""
    try:
        source = Tables([path])
    except ValueError as error:
        return NAMED if str(path) in str(error) or path.name in str(error) else UNNAMED
    for i in range(len(source)):
        for k in range(len(source.record(i).images)):
            try:
                source.image_bytes(i, k)
            except ValueError:  # of this record alone: told by the loader, with its id
                continue
    return READ if len(source) == ROWS else LOST


def in_child(paths: Sequence[Path]) -> tuple[int, list[int]]:
    """The same in a process of its own: how that ended, and what became of each file until then."""
    told = paths[0].with_name("told")
    pid = os.fork()
    if pid == 0:
        status = 9
        try:
            with told.open("wb", buffering=0) as stream:
                for path in paths:
                    stream.write(bytes([read_all(path)]))
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), list(told.read_bytes())


@pytest.mark.parametrize("kind", ["stream", "file", "parquet"])
def test_flipped_bits_are_named_or_do_no_harm(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"t.{'parquet' if kind == 'parquet' else 'arrow'}"
    whole, rng = write(path, kind), np.random.default_rng(0)
    assert read_all(path) == READ
    paths = [path.with_name(f"{number}{path.suffix}") for number in range(300)]
    for damaged in paths:
        data = bytearray(whole)
        for bit in rng.integers(0, 8 * len(data), rng.integers(1, 4)).tolist():
            data[bit // 8] ^= 1 << bit % 8
        damaged.write_bytes(data)
    status, found = in_child(paths)
    assert (status, len(found)) == (0, len(paths))
    assert set(found) == {READ, NAMED}


def test_offsets_that_lead_out_of_the_file_are_named(tmp_path: Path) -> None:
    """As long as nothing reads the text, pyarrow does not see them; reading it then ends the process."""
    path = tmp_path / "t.arrow"
    whole = write(path, "file")
    offsets = np.array([0, 2, 4, 6, 8, 10], np.int32).tobytes()  # of the ids of the first batch
    assert whole.count(offsets) >= 1
    wrong = np.array([0, 2, 4, 6, 1 << 30, (1 << 30) + 4], np.int32).tobytes()
    path.write_bytes(whole.replace(offsets, wrong))
    assert in_child([path]) == (0, [NAMED])


@pytest.mark.parametrize("kind", ["stream", "file", "parquet"])
def test_a_file_that_was_cut_is_named_wherever_it_was(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"t.{'parquet' if kind == 'parquet' else 'arrow'}"
    whole = write(path, kind)
    for length in range(0, len(whole), 8 if kind == "stream" else 40):  # messages begin at multiples of 8
        cut = path.with_name(f"{length}{path.suffix}")
        cut.write_bytes(whole[:length])
        assert read_all(cut) == NAMED, length


def test_text_that_is_no_utf_8_spoils_its_own_row_alone(tmp_path: Path) -> None:
    path = tmp_path / "t.arrow"
    whole = write(path, "file")
    path.write_bytes(whole.replace(b"What is number 7?", b"What is \xff\xfenumbe7?"[:17]))
    source = Tables([path])
    assert source.faults == (7,)
    assert "cannot be read" in source.record(7).fault
