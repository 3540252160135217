"""The check before a run finds what would go wrong in it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from data_samples import entry, side, write_dataset

from llava_kd.data.records import LlavaJson
from llava_kd.data.verify import verify, verify_file, write_sound


@pytest.fixture
def spoilt(tmp_path: Path) -> Path:
    """Ten records: one missing image, one cut, one of no use, one of no conversation, one path outside."""
    entries = [entry(i, images=0 if i == 9 else 1) for i in range(10)]
    path = write_dataset(tmp_path, entries)
    (tmp_path / entries[0]["image"]).unlink()
    cut = tmp_path / entries[1]["image"]
    cut.write_bytes(cut.read_bytes()[:-300])
    (tmp_path / entries[2]["image"]).write_bytes(b"")
    entries[3].pop("conversations")
    entries[4]["image"] = "../outside.jpg"
    path.write_text(json.dumps(entries))
    return path


def test_every_fault_is_found_and_named(spoilt: Path) -> None:
    report = verify_file(spoilt, spoilt.parent, num_threads=2)
    assert not report.is_sound
    assert (report.records, report.images, report.text_only) == (8, 7, 1)
    assert [line.split(":")[0] for line in report.structural_errors] == ["record 'r3'", "record 'r4'"]
    assert [line.split(":")[0] for line in report.bad_images] == ["record 'r0'", "record 'r1'", "record 'r2'"]
    for words in ("is missing", "damaged", "is empty", "no conversations", "below the image root"):
        assert words in report.summary()


def test_truncated_and_unencodable_records_are_counted(tmp_path: Path) -> None:
    entries = [entry(i, images=i % 2, rounds=1 + 3 * (i % 2)) for i in range(10)]
    path = write_dataset(tmp_path, entries)
    reading = side(max_length=90)
    encoder = reading.encoder()
    source = LlavaJson(path, tmp_path)
    expected = sum(encoder(source.record(i)).is_truncated for i in range(10))
    assert 0 < expected < 10
    for report in (verify_file(path, tmp_path, side=reading), verify(source, side=reading)):
        assert report.is_sound
        assert report.truncated == expected
        assert report.tokens_max == 90
        assert "are truncated" in report.summary()
    too_short = verify(source, side=side(max_length=12))
    assert too_short.unencodable is not None
    assert len(too_short.unencodable) == 10
    assert "0 records (0.00%) are truncated" in too_short.summary()


def test_report_is_saved_as_json(spoilt: Path) -> None:
    report = verify_file(spoilt, spoilt.parent)
    report.save(spoilt.parent / "report.json")
    saved = json.loads((spoilt.parent / "report.json").read_text())
    assert saved["records"] == 8
    assert saved["truncated"] is None
    assert len(saved["bad_images"]) == 3


def test_sound_records_are_kept(spoilt: Path) -> None:
    kept = spoilt.parent / "kept.json"
    assert write_sound(spoilt, kept) == 2
    source = LlavaJson(kept, spoilt.parent)
    assert [source.record(i).id for i in range(len(source))] == [
        f"r{i}" for i in range(10) if i not in (3, 4)
    ]


def test_layout_check_counts_the_folders(tmp_path: Path) -> None:
    path = write_dataset(tmp_path, [entry(i, images=i % 2) for i in range(6)])
    command = [
        sys.executable,
        str(Path(__file__).parents[1] / "data" / "check_layout.py"),
        str(path),
        str(tmp_path),
    ]
    sound = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "images                           3 records" in sound.stdout
    assert "no image                         3 records" in sound.stdout
    (tmp_path / "images" / "1_0.jpg").unlink()
    faulty = subprocess.run(command, capture_output=True, text=True, check=False)
    assert faulty.returncode == 1
    assert "problem: images: images/1_0.jpg is missing" in faulty.stdout
