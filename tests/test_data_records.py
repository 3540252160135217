"""LLaVA files: what is read, and what is refused by name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from data_samples import encoded_image, entry, write_dataset

from llava_kd.data.sources.llava_json import LlavaJson, Turn, canonical, parse_record


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
    "empty columns": (lambda raw: raw.update(conversations={"from": [], "value": []}), "no conversations"),
    "conversations as text": (lambda raw: raw.update(conversations="[]"), "no conversations; give"),
    "turn that is no object": (lambda raw: raw["conversations"].append("?"), "turn 2 must be an object"),
    "too many placeholders": (_turn(0, value="<image><image>\nWhat?"), "got 2 for 1 images"),
    "placeholder in answer": (_turn(1, value="<image>"), "an answer holds <image> in a record with images"),
    "empty answer": (_turn(1, value=" \n"), "turn 1 is an empty answer"),
    "unknown role": (_turn(1, **{"from": "robot"}), "unknown role 'robot'"),
    "roles not alternating": (_turn(1, **{"from": "human"}), "turn 1 must be from the assistant"),
    "only an answer": (lambda raw: raw["conversations"].pop(0), "the last turn must be an answer"),
    "late system turn": (_turn(1, **{"from": "system"}), "turn 1 must be from the assistant, got system"),
    "no answer": (lambda raw: raw["conversations"].pop(), "the last turn must be an answer"),
    "turn without text": (_turn(0, value=None), "turn 0 must have"),
    "unknown part": (
        _turn(0, value=[{"type": "video"}]),
        "part 0 must be of type text or image, got 'video'",
    ),
    "text part without text": (_turn(0, value=[{"type": "text"}]), "part 0 is of type text but has no text"),
    "half an emoji": (_turn(1, value="good \ud83d"), "turn 1 holds half of a surrogate pair, '\\ud83d'"),
    "path upwards": (lambda raw: raw.update(image="a/../../b.jpg"), "must stay below the image root"),
    "windows path upwards": (lambda raw: raw.update(image="..\\b.jpg"), "must stay below the image root"),
    "drive": (
        lambda raw: raw.update(image="C:\\img\\b.jpg"),
        "has a drive letter; give it relative to the image root",
    ),
    "address": (lambda raw: raw.update(image="https://a.b/c.jpg"), "is a URL, not a file; download it"),
    "data in the text": (
        lambda raw: raw.update(image="data:image/png;base64,AA"),
        "is written into the text",
    ),
    "image of wrong type": (lambda raw: raw.update(image=[3]), "`image` must be a path"),
    "picture under another name": (
        lambda raw: raw.update(image_path=raw.pop("image")),
        "its picture is in `image_path`, which is not read; rename `image_path` to `image`",
    ),
    "pictures under another name": (
        lambda raw: raw.update(image=None, imgs=[raw["image"]]),
        "its picture is in `imgs`",
    ),
    "picture inside of a turn": (
        lambda raw: raw["conversations"][0].update(image=raw.pop("image")),
        "turn 0 has its picture in `image`",
    ),
    "picture named in the text": (
        lambda raw: [raw.pop("image"), _turn(0, value="Picture 1: <img>a/b.jpg</img>\nWhat?")(raw)],
        "named in the text, '<img>a/b.jpg</img>'",
    ),
    "picture of nothing": (lambda raw: raw.update(image=None), "the record gives no picture"),
    "picture after the words": (
        lambda raw: [raw.update(image=""), _turn(0, value="What?\n<image>")(raw)],
        "the record gives no picture",
    ),
    "video": (
        lambda raw: [raw.update(video="a.mp4", image=""), _turn(0, value="<video>\nWhat?")(raw)],
        "it has a `video`, and only images are read",
    ),
    "answer that is not to be trained on": (
        lambda raw: raw["conversations"].extend(
            [{"from": "human", "value": "?"}, {"from": "gpt", "value": "No.", "loss": False}]
        ),
        "turn 3 is an answer with `loss` False, which is to be left out of the loss",
    ),
    "pictures by number in another order": (
        _turn(0, value=None, content=[{"type": "image", "index": k} for k in (1, 0)]),
        "its image parts have the numbers [1, 0], and pictures are read in order",
    ),
    "answer of no weight": (_turn(1, weight=0), "turn 1 is an answer with `weight` 0"),
    "boxes beside the talk": (
        lambda raw: [raw.update(objects={"bbox": [[1, 2, 3, 4]]}), _turn(1, value="At <bbox>.")(raw)],
        "its text has <bbox> in the place of an entry of `objects`, which is not read",
    ),
    "number as answer": (_turn(1, value=3), "the text of turn 1 is 3 of type int; write it as a string"),
    "image and images": (lambda raw: raw.update(images=["b.jpg"]), "not both"),
}


@pytest.mark.parametrize(("spoil", "reason"), BAD.values(), ids=BAD.keys())
def test_unusable_record_keeps_its_place_and_is_named(
    tmp_path: Path, spoil: Callable[[dict], None], reason: str
) -> None:
    entries = [entry(0), entry(1), entry(2)]
    path = write_dataset(tmp_path, entries)
    spoil(entries[1])
    path.write_text(json.dumps(entries))
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        source = LlavaJson(path, tmp_path, cache=cache)
        assert source.faults == (1,)
        bad = source.record(1)
        assert (bad.id, bad.turns, bad.images) == ("r1", (), ())
        assert bad.fault.startswith("record 'r1': ")
        assert reason in bad.fault
        assert source.record(2) == parse_record(entry(2), 2)
    path.write_text(json.dumps(entries[1:2]))
    with pytest.raises(ValueError, match=r"data.json has 1 unusable records and no other") as error:
        LlavaJson(path, tmp_path)
    assert reason in str(error.value)


def test_images_without_a_place_come_before_the_first_question() -> None:
    raw = entry(0, images=2, rounds=2)
    raw["conversations"][0]["value"] = "Which?"
    mended = parse_record(raw, 0)
    raw["conversations"][0]["value"] = "<image>\n<image>\nWhich?"
    assert mended.turns == parse_record(raw, 0).turns
    assert "its images are put before the first question" in mended.note
    assert not parse_record(raw, 0).note


@pytest.mark.parametrize("question", ["What is in <image> of RSS?", "What is a feed's <image>"])
def test_image_is_a_word_in_a_record_without_images(question: str) -> None:
    raw = entry(0, images=0)
    raw["conversations"][0]["value"] = question
    raw["conversations"][1]["value"] = "<image> holds a logo."
    record = parse_record(raw, 0)
    assert [turn.text for turn in record.turns] == [question, "<image> holds a logo."]
    assert not any(record.has_places(turn) for turn in record.turns)


def test_a_record_without_images_may_show_an_element_of_that_name() -> None:
    raw = entry(0, images=0)
    raw["conversations"][0]["value"] = "<image>\n  <url>a.png</url>\n</image>\nWhat is wrong?"
    raw |= {"source": "feeds.png.txt", "image": float("nan"), "image_id": "12", "file_name": ""}
    assert parse_record(raw, 0).images == ()


def test_paths_in_objects_are_read_like_paths() -> None:
    raw = entry(0, images=2)
    objects = [{"path": path, "bytes": None} for path in raw["image"]]
    assert parse_record(raw | {"image": objects}, 0) == parse_record(raw, 0)
    one = entry(0)
    assert parse_record(one | {"image": {"path": one["image"]}}, 0) == parse_record(one, 0)
    with pytest.raises(ValueError, match="`image` must be a path"):
        parse_record(one | {"image": {"path": one["image"], "bytes": "iVBO"}}, 0)


def test_an_answer_before_any_question_is_left_out_as_llava_does() -> None:
    raw = entry(0)
    expected = parse_record(raw, 0).turns
    greeting = {"from": "gpt", "value": "Hello, how can I help?"}
    record = parse_record(raw | {"conversations": [greeting, *raw["conversations"]]}, 0)
    assert record.turns == expected
    assert "its first turn is an answer without a question and is skipped" in record.note


def test_system_turn_comes_first() -> None:
    raw = entry(0)
    for system in ({"from": "system", "value": " Be brief. "}, {"role": "system", "content": "Be brief."}):
        record = parse_record(raw | {"conversations": [system, *raw["conversations"]]}, 0)
        assert record.turns == (Turn("system", "Be brief."), *parse_record(raw, 0).turns)
    beside = parse_record(raw | {"system": " Be brief. "}, 0)
    assert (beside.turns, "system" in beside.extra) == (record.turns, False)
    both = raw | {"conversations": [system, *raw["conversations"]]}
    assert parse_record(both | {"system": "Be brief."}, 0).turns == record.turns
    with pytest.raises(ValueError, match="two system texts, a first turn and `system`; keep one"):
        parse_record(both | {"system": "Be long."}, 0)
    for nothing in ("", None, [], 3):
        assert parse_record(raw | {"system": nothing}, 0).turns == parse_record(raw, 0).turns


def test_a_conversation_may_be_the_json_of_a_column_of_texts() -> None:
    raw = entry(0)
    as_text = raw | {"conversations": json.dumps(raw["conversations"])}
    assert parse_record(as_text, 0) == parse_record(raw, 0)
    with pytest.raises(ValueError, match="its conversation is a text that is no JSON"):
        parse_record(raw | {"conversations": "[{'from': 'human'}]"}, 0)
    with pytest.raises(ValueError, match="no conversations, got str"):
        parse_record(raw | {"conversations": "What is it?"}, 0)


def test_a_conversation_may_be_a_column_for_each_key_of_a_turn() -> None:
    """As `datasets` keeps what it was told is a Sequence of mappings."""
    raw = entry(0, rounds=2)
    turns = raw["conversations"]
    columns = {key: [turn[key] for turn in turns] for key in turns[0]}
    assert parse_record(raw | {"conversations": columns}, 0) == parse_record(raw, 0)
    columns["value"].pop()
    with pytest.raises(ValueError, match="no conversations, got dict"):
        parse_record(raw | {"conversations": columns}, 0)


def test_an_answer_that_counts_is_read_as_any_other() -> None:
    raw, marked = entry(0, rounds=2), entry(0, rounds=2)
    marked["conversations"][1]["loss"] = True
    marked["conversations"][3].update(weight=1, loss=None)
    marked["conversations"][0]["weight"] = 0
    assert parse_record(marked, 0) == parse_record(raw, 0)


def test_messages_are_read_like_conversations() -> None:
    raw = entry(3, images=2, rounds=2)
    plain = parse_record(raw, 0)
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": roles[t["from"]], "content": t["value"]} for t in raw["conversations"]]
    kept = {"id": raw["id"], "images": raw["image"]}
    assert parse_record(kept | {"messages": messages}, 0) == plain
    words = raw["conversations"][0]["value"].replace("<image>\n", "")
    for one, other in (
        ({"type": "image"}, {"type": "image", "text": None}),
        ({"type": "image", "image": raw["image"][0]}, {"type": "image", "path": raw["image"][1]}),
        tuple({"type": "image_url", "image_url": url} for url in ({"url": raw["image"][0]}, raw["image"][1])),
    ):
        messages[0]["content"] = [one, other, {"type": "text", "text": words}]
        messages[1]["content"] = [{"type": "text", "text": plain.turns[1].text}]
        named = {"id": raw["id"], "messages": messages}
        assert parse_record(named if "image" in one or "image_url" in one else named | kept, 0) == plain


@pytest.mark.parametrize("name", ["images\\0_0.png", "./images/0_0.png", "absolute", "file://"])
def test_image_paths_as_other_tools_write_them(tmp_path: Path, name: str) -> None:
    path = write_dataset(tmp_path, [entry(0)])
    absolute = str(tmp_path / "images/0_0.png")
    raw = entry(0) | {"image": {"absolute": absolute, "file://": f"file://{absolute}"}.get(name, name)}
    path.write_text(json.dumps([raw]))
    source = LlavaJson(path, tmp_path)
    assert source.image_bytes(0, 0) == (tmp_path / "images/0_0.png").read_bytes()


def test_an_absolute_path_outside_of_the_root_is_refused(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "root", [entry(0)])
    (tmp_path / "secret.jpg").write_bytes(encoded_image())
    path.write_text(json.dumps([entry(0) | {"image": str(tmp_path / "secret.jpg")}]))
    for follow in (False, True):
        source = LlavaJson(path, tmp_path / "root", follow_symlinks=follow)
        with pytest.raises(ValueError, match=r"set data.images to a folder above it"):
            source.image_bytes(0, 0)


def test_a_pipe_in_the_place_of_an_image_is_not_waited_for(tmp_path: Path) -> None:
    path = write_dataset(tmp_path, [entry(0)])
    (tmp_path / "images/0_0.png").unlink()
    os.mkfifo(tmp_path / "images/0_0.png")
    with pytest.raises(ValueError, match="must be a regular file"):
        LlavaJson(path, tmp_path).image_bytes(0, 0)


def test_missing_image_is_named(tmp_path: Path) -> None:
    entries = [entry(0)]
    source = LlavaJson(write_dataset(tmp_path, entries), tmp_path)
    (tmp_path / entries[0]["image"]).unlink()
    with pytest.raises(ValueError, match=f"image '{entries[0]['image']}' is missing below"):
        source.image_bytes(0, 0)


@pytest.mark.parametrize(
    ("written", "root", "advice"),
    [
        ("images/é a.png", "images", r"it is below .*/d; set data.images \(--images\) to that folder"),
        ("data/images/é a.png", "", "'images/é a.png' is there; write the path so"),
        ("images/%C3%A9%20a.png", "", "'images/é a.png' is there"),
        ("images/é a.png ", "", "'images/é a.png' is there"),
        ("images/e\u0301 a.png", "", "'images/é a.png' is there"),
        ("images/é a.PNG", "", "'images/é a.png' is there"),
        ("images/é a", "", "'images/é a.png' is there"),
        ("images/b.png", "", r"below .*/d: check data.images \(--images\) and the path"),
        ("images/" + "b" * 300, "", "too long"),
    ],
)
def test_a_missing_image_is_looked_for_nearby(tmp_path: Path, written: str, root: str, advice: str) -> None:
    (tmp_path / "d" / "images").mkdir(parents=True)
    (tmp_path / "d" / "images" / "é a.png").write_bytes(encoded_image())
    path = tmp_path / "d.json"
    path.write_text(json.dumps([entry(0) | {"image": written}]))
    source = LlavaJson(path, tmp_path / "d" / root)
    with pytest.raises((ValueError, OSError), match=advice):
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
