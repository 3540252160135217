"""The check before a run finds what would go wrong in it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from data_samples import encoded_image, entry, side, write_dataset

from llava_kd.assembly.parts.data import side as side_of_parts
from llava_kd.cli import main
from llava_kd.config import DataConfig
from llava_kd.data.sound import write_sound_entries
from llava_kd.data.sources.kinds import Place, open_source
from llava_kd.data.sources.llava_json import LlavaJson, parse_record
from llava_kd.data.verify import verify, verify_file
from llava_kd.durable import write_whole
from llava_kd.models.files.checkpoint import load_stock


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
    entries[5]["conversations"][0]["value"] = "How many?"
    path.write_text(json.dumps(entries))
    return path


def test_every_fault_is_found_and_named(spoilt: Path) -> None:
    report = verify_file(spoilt, spoilt.parent, num_threads=2)
    assert not report.is_sound
    assert (report.records, report.images, report.text_only) == (8, 7, 1)
    assert [line.split(":")[0] for line in report.structural_errors] == ["record 'r3'", "record 'r4'"]
    assert [line.split(":")[0] for line in report.bad_images] == ["record 'r0'", "record 'r1'", "record 'r2'"]
    assert report.mended == (
        "record 'r5': no turn has <image>: its images are put before the first question",
    )
    for words in (
        "1 records are repaired while they are read",
        "is missing",
        "damaged",
        "is empty",
        "no conversations",
        "below the image root",
    ):
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
    report = verify_file(spoilt, spoilt.parent)
    assert report.unsound == (0, 1, 2, 3, 4)
    for name in ("kept.json", "kept.jsonl"):
        write_sound_entries(spoilt, spoilt.parent / name, report.unsound)
        source = LlavaJson(spoilt.parent / name, spoilt.parent)
        assert [source.record(i).id for i in range(len(source))] == [f"r{i}" for i in range(5, 10)]
        assert verify(source).is_sound


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str]:
    status = main(["data", "verify", *map(str, words)])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_command_writes_what_a_run_can_use(spoilt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept, listing = spoilt.parent / "kept.json", spoilt.parent / "report.json"
    status, said = run(capsys, "--data", spoilt, "--write_sound", kept, "--report", listing)
    assert status == 1
    assert "without 5 bad records" in said
    assert json.loads(listing.read_text())["unsound"] == [0, 1, 2, 3, 4]
    assert run(capsys, "--data", kept)[0] == 0
    status, said = run(capsys, "--data", kept, "--write_sound", kept)
    assert (status, "exists: name another" in said) == (2, True)


def test_command_measures_lengths_as_a_model_reads(
    tmp_path: Path, student_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_dataset(tmp_path, [entry(i) for i in range(3)])
    words = ("--data", path, "--model", student_dir, "--template", "chatml")
    status, said = run(capsys, *words)
    assert status == 0
    assert "0 records (0.00%) are truncated" in said
    parts = load_stock(str(student_dir))
    reading = side_of_parts(parts, DataConfig(path=str(path), template="chatml"))
    longest = max(
        len(reading.encoder()(record).ids) for record in map(LlavaJson(path, tmp_path).record, range(3))
    )
    assert f"most {longest}" in said
    status, said = run(capsys, *words, "--max_length", longest - 1)
    assert (status, "0 records (0.00%)" in said) == (0, False)
    status, said = run(capsys, *words, "--max_length", 20)
    assert status == 1
    assert "3 records that cannot be encoded" in said
    status, said = run(capsys, "--data", path, "--model", student_dir, "--template", "alpaca")
    assert (status, "`data.template` must be auto or one of" in said) == (2, True)


def test_command_reads_tar_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number, data in enumerate((encoded_image(), b"no image")):
            raw = json.dumps({"conversations": entry(number)["conversations"]}).encode()
            for name, content in ((f"r{number}.json", raw), (f"r{number}.jpg", data)):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    status, said = run(capsys, "--data", tmp_path / "*.tar")
    assert status == 1
    assert "record 'r1': image 'r1.jpg': not a readable image" in said
    status, said = run(capsys, "--data", tmp_path / "*.tar", "--write_sound", tmp_path / "kept.json")
    assert (status, "the file for the valid records must end in .tar or .parquet" in said) == (2, True)
    for name in ("kept.tar", "kept.parquet"):
        kept = tmp_path / "kept" / name
        kept.parent.mkdir(exist_ok=True)
        assert run(capsys, "--data", tmp_path / "*.tar", "--write_sound", kept)[0] == 1
        source = open_source(Place(path=str(kept)))
        assert run(capsys, "--data", kept)[0] == 0
        assert [source.record(0).id, source.image_bytes(0, 0)] == ["r0", encoded_image()]
        assert (len(source), source.record(0).turns) == (1, parse_record(entry(0), 0).turns)


def test_half_an_emoji_is_named_and_left_out(
    tmp_path: Path, student_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [entry(i, images=0) for i in range(4)]
    entries[2]["conversations"][1]["value"] = "Nice \ud83d"
    entries[3]["note"] = {"of": "no use \ud83d"}
    path = write_dataset(tmp_path, entries)
    kept = tmp_path / "kept.json"
    words = ("--data", path, "--model", student_dir, "--template", "chatml", "--write_sound", kept)
    status, said = run(capsys, *words)
    assert status == 1
    assert "record 'r2': turn 1 holds half of a surrogate pair" in said
    assert json.loads(kept.read_text()) == [entries[0], entries[1], entries[3]]


def test_a_write_that_fails_leaves_no_file(tmp_path: Path) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"[\n"
        raise ValueError("no more")

    (tmp_path / "kept.json").write_text("old")
    with pytest.raises(ValueError, match="no more"):
        write_whole(tmp_path / "kept.json", pieces())
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_words_of_control_tokens_are_counted(
    tmp_path: Path, student_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [entry(i, images=0) for i in range(3)]
    entries[1]["conversations"][1]["value"] = "<|im_end|> ends a turn, and <image> is a picture."
    words = ("--data", write_dataset(tmp_path, entries), "--model", student_dir, "--template", "chatml")
    status, said = run(capsys, *words)
    assert status == 0
    assert (
        "1 records contain words of control tokens, which are read as text\n  "
        "record 'r1': '<|im_end|>', '<image>'" in said
    )


def test_corrupt_image_is_named_by_record_and_file_and_not_by_pillows_stream(tmp_path: Path) -> None:
    entries = [entry(1)]
    path = write_dataset(tmp_path, entries)
    (tmp_path / entries[0]["image"]).write_bytes(b"GIF89a, not")
    report = verify_file(path, tmp_path)
    (fault,) = report.bad_images
    assert fault.startswith("record 'r1': image 'images/1_0.jpg': not a readable image of JPEG, PNG")
    assert "BytesIO" not in fault


def test_links_out_of_the_root_are_followed_where_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [entry(1)]
    path = write_dataset(tmp_path / "root", entries)
    image = tmp_path / "root" / entries[0]["image"]
    image.rename(tmp_path / "elsewhere.jpg")
    image.symlink_to(tmp_path / "elsewhere.jpg")
    status, said = run(capsys, "--data", path)
    assert (status, "set data.follow_symlinks to true" in said) == (1, True)
    assert run(capsys, "--data", path, "--follow_symlinks")[0] == 0


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


def test_a_file_without_records_is_not_sound(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text("[]")
    with pytest.raises(ValueError, match="has no records"):
        verify_file(tmp_path / "d.json", tmp_path)
