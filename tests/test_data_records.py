"""LLaVA files: what is read, and what is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from data_samples import encoded_image, entry, write_dataset

from llava_kd.data.records import LlavaJson, Turn, canonical, parse_record


def test_reads_image_multi_image_and_text_only_records(tmp_path: Path) -> None:
    entries = [entry(0), entry(1, images=2, rounds=2), entry(2, images=0) | {"type": "count"}]
    source = LlavaJson(write_dataset(tmp_path, entries), tmp_path)
    assert [len(source.record(i).images) for i in range(len(source))] == [1, 2, 0]
    assert source.record(1).turns[2] == Turn("user", "How many shapes are in picture 1, part 1?")
    assert source.record(2).extra["type"] == "count"
    assert source.image_bytes(1, 1) == (tmp_path / entries[1]["image"][1]).read_bytes()


def test_json_lines_give_the_same_records(tmp_path: Path) -> None:
    entries = [entry(i, images=i % 3) for i in range(7)]
    path = write_dataset(tmp_path, entries)
    lines = tmp_path / "data.jsonl"
    lines.write_text("\n".join(json.dumps(raw) for raw in entries) + "\n\n")
    one, other = LlavaJson(path, tmp_path), LlavaJson(lines, tmp_path)
    assert [one.record(i) for i in range(7)] == [other.record(i) for i in range(7)]


def test_images_key_and_image_list_are_the_same() -> None:
    raw = entry(0, images=2)
    other = {k: v for k, v in raw.items() if k != "image"} | {"images": raw["image"]}
    assert parse_record(raw, 0) == parse_record(other, 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What?\n<image>", "<image>\nWhat?"),
        ("<image>\nWhat?", "<image>\nWhat?"),
        (" <image> ", "<image>"),
        ("<image> and <image>?", "<image> and <image>?"),
        ("  words ", "words"),
    ],
)
def test_single_placeholder_comes_first(text: str, expected: str) -> None:
    assert canonical(text) == expected


def test_repeated_ids_are_told_apart(tmp_path: Path) -> None:
    entries = [entry(0) | {"id": name} for name in ("a", "a", "a#2", "a", "b")]
    source = LlavaJson(write_dataset(tmp_path, entries), tmp_path)
    ids = [source.record(i).id for i in range(5)]
    assert ids == ["a", "a#2", "a#2#2", "a#3", "b"]


def _without(key: str) -> Callable[[dict], None]:
    return lambda raw: raw.pop(key)


def _turn(number: int, **changes: object) -> Callable[[dict], None]:
    return lambda raw: raw["conversations"][number].update(changes)


BAD = {
    "no conversations": (_without("conversations"), "no conversations"),
    "empty conversations": (lambda raw: raw.update(conversations=[]), "no conversations"),
    "too few placeholders": (_turn(0, value="What?"), "got 0 for 1 images"),
    "too many placeholders": (_turn(0, value="<image><image>\nWhat?"), "got 2 for 1 images"),
    "text-only with placeholder": (_without("image"), "got 1 for 0 images"),
    "placeholder in answer": (_turn(1, value="<image>"), "turn 1 is an answer with <image>"),
    "empty answer": (_turn(1, value=" \n"), "turn 1 is an empty answer"),
    "unknown role": (_turn(1, **{"from": "robot"}), "unknown role 'robot'"),
    "roles not alternating": (_turn(1, **{"from": "human"}), "turn 1 must be from the assistant"),
    "answer first": (_turn(0, **{"from": "gpt"}), "turn 0 must be from the user"),
    "no answer": (lambda raw: raw["conversations"].pop(), "the last turn must be an answer"),
    "turn without text": (_turn(0, value=None), "turn 0 must have"),
    "absolute path": (lambda raw: raw.update(image="/etc/passwd"), "must stay below the image root"),
    "path upwards": (lambda raw: raw.update(image="a/../../b.jpg"), "must stay below the image root"),
    "windows path": (lambda raw: raw.update(image="..\\b.jpg"), "must stay below the image root"),
    "image of wrong type": (lambda raw: raw.update(image=[3]), "`image` must be a path"),
    "image and images": (lambda raw: raw.update(images=["b.jpg"]), "not both"),
}


@pytest.mark.parametrize(("spoil", "reason"), BAD.values(), ids=BAD.keys())
def test_unusable_record_is_named_with_its_file(
    tmp_path: Path, spoil: Callable[[dict], None], reason: str
) -> None:
    entries = [entry(0), entry(1)]
    path = write_dataset(tmp_path, entries)
    spoil(entries[1])
    path.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=r"data.json has 1 unusable records") as error:
        LlavaJson(path, tmp_path)
    assert "record 'r1': " in str(error.value)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("d.json", "[1", "is not JSON"),
        ("d.json", b'["caf\xe9"]', "must be UTF-8 text, but byte 5 is not"),
        ("d.json", b"\xef\xbb\xbf[]", "has no records"),
        ("d.jsonl", b"[]\r\n\r\n\xff", "line 3 must be UTF-8 text"),
        ("d.json", "{}", "must hold a list"),
        ("d.json", "[]", "has no records"),
        ("d.json", "[3]", "position 0 must be an object"),
        ("d.jsonl", '{"id": 1}\n{', "line 2 is not JSON"),
        ("d.jsonl", "", "has no records"),
    ],
)
def test_unreadable_file_is_an_error(tmp_path: Path, name: str, text: str | bytes, reason: str) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ValueError, match=reason):
        LlavaJson(path, tmp_path)


def test_missing_file_and_folder_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no data file"):
        LlavaJson(tmp_path / "d.json", tmp_path)
    with pytest.raises(ValueError, match="no image folder"):
        LlavaJson(tmp_path / "d.json", tmp_path / "images")


def test_missing_image_is_named(tmp_path: Path) -> None:
    entries = [entry(0)]
    source = LlavaJson(write_dataset(tmp_path, entries), tmp_path)
    (tmp_path / entries[0]["image"]).unlink()
    with pytest.raises(ValueError, match=f"image '{entries[0]['image']}' is missing below"):
        source.image_bytes(0, 0)


def test_symbolic_link_may_not_leave_the_image_root(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    elsewhere.mkdir()
    entries = [entry(0)]
    path = write_dataset(root, entries)
    image = root / entries[0]["image"]
    image.unlink()
    (elsewhere / "secret.jpg").write_bytes(encoded_image())
    image.symlink_to(elsewhere / "secret.jpg")
    with pytest.raises(ValueError, match="leaves the image root"):
        LlavaJson(path, root).image_bytes(0, 0)
    assert LlavaJson(path, root, follow_symlinks=True).image_bytes(0, 0)


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    path = write_dataset(tmp_path, [entry(0)])
    first = LlavaJson(path, tmp_path).fingerprint
    assert LlavaJson(path, tmp_path).fingerprint == first
    path.write_text(json.dumps([entry(1)]))
    assert LlavaJson(path, tmp_path).fingerprint != first
