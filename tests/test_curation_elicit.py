"""`llava-kd data answer`: what models write becomes records that say whence, or is dropped by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava_kd.cli import main
from llava_kd.curation.elicit.entries import OPEN, read_asked
from llava_kd.curation.elicit.making import questions_in, read_prompts
from llava_kd.data.sources.llava_json import LlavaJson
from llava_kd.evaluation.generation.generate import Generator

TOKENS = "--max_new_tokens=6"


@pytest.fixture
def entries(shapes_dir: Path) -> list[dict]:
    return json.loads((shapes_dir / "test.json").read_text())


def written(path: Path, entries: object) -> Path:
    path.write_text(json.dumps(entries))
    return path


def answer(how: str, data: Path, shapes_dir: Path, model: Path, out: Path, *words: str) -> int:
    given = ["--data", str(data), "--images", str(shapes_dir), "--model", str(model), "--out", str(out)]
    return main(["data", "answer", how, *given, "--device", "cpu", "--batch_size", "4", *words])


def records(out: Path) -> list[dict]:
    return json.loads((out / "records.json").read_text())


def dropped(out: Path) -> dict[str, str]:
    lines = (json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines())
    return {one["id"]: one["reason"] for one in lines}


def told(
    said: dict[str, str], how: str, data: Path, shapes: Path, model: Path, out: Path, *words: str
) -> int:
    """The command, then again with other answers on disk, as a model of more than random weights gives them.

    `said` is by a part of the question's id; an answer that none of it names stays as the model gave it.
    """
    answer(how, data, shapes, model, out, TOKENS, *words)
    path = out / "answers" / "answers.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if (text := next((text for key, text in said.items() if key in line["id"]), None)) is not None:
            line["answer"] = text
            line.pop("cut", None)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return answer(how, data, shapes, model, out, TOKENS, *words)


def test_open_questions_are_answered_and_an_empty_answer_is_dropped_by_name(
    entries, shapes_dir: Path, teacher_dir: Path, tmp_path: Path, capsys
) -> None:
    for raw in entries[:4]:
        del raw["conversations"][-1]
    ids = [raw["id"] for raw in entries]
    said = {ids[0]: "red", ids[1]: "  ", ids[2]: "two", ids[3]: "a star."}
    data = written(tmp_path / "open.json", entries)
    out = tmp_path / "out"
    assert told(said, "label", data, shapes_dir, teacher_dir, out) == 0
    assert "3 records in" in capsys.readouterr().out
    made = records(out)
    assert [(one["id"], one["conversations"][-1]["value"]) for one in made] == [
        (ids[0], "red"),
        (ids[2], "two"),
        (ids[3], "a star."),
    ]
    assert made[0]["image"] == entries[0]["image"]
    assert made[0]["type"] == entries[0]["type"]
    assert made[0]["conversations"][0]["value"] == entries[0]["conversations"][0]["value"]
    origin = made[0]["elicited"]
    assert (origin["how"], origin["model"], origin["seed"]) == ("label", str(teacher_dir), 0)
    assert origin["prompt"] == entries[0]["conversations"][0]["value"]
    assert len(origin["model_hash"]) == 16
    assert origin["settings"]["max_new_tokens"] == 6
    left = dropped(out)
    assert left[ids[1]] == "the answer is empty"
    assert all("answered already" in left[name] for name in ids[4:])
    source = LlavaJson(out / "records.json", shapes_dir)
    assert [source.record(i).fault for i in range(len(source))] == [""] * 3


def test_an_answer_that_does_not_end_is_dropped_and_a_second_call_asks_nothing(
    entries, shapes_dir: Path, teacher_dir: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    data, out = written(tmp_path / "all.json", entries), tmp_path / "out"
    words = ["--relabel", "--max_new_tokens=1"]
    assert answer("label", data, shapes_dir, teacher_dir, out, *words) == 2
    assert "no record is left of 6" in capsys.readouterr().err
    assert all(
        "cut off after 1 tokens" in reason or reason == "the answer is empty"
        for reason in dropped(out).values()
    )
    monkeypatch.setattr(Generator, "load", None)
    assert answer("label", data, shapes_dir, teacher_dir, out, *words) == 2
    assert answer("label", data, shapes_dir, teacher_dir, out, *words, "--temperature=1") == 2
    assert "holds the answers of another run (drawn" in capsys.readouterr().err


def test_every_answer_of_a_talk_is_given_anew_behind_the_true_ones(
    shapes_dir: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    talk = next(
        raw
        for raw in json.loads((shapes_dir / "instructions.json").read_text())
        if len(raw["conversations"]) > 4
    )
    said = {f"{talk['id']}#{k + 1}": f"answer {k}" for k in range(len(talk["conversations"]) // 2)}
    data, out = written(tmp_path / "talk.json", [talk]), tmp_path / "out"
    assert told(said, "label", data, shapes_dir, teacher_dir, out, "--relabel") == 0
    (made,) = records(out)
    turns = [turn["value"] for turn in made["conversations"]]
    assert turns[1::2] == [f"answer {k}" for k in range(len(turns) // 2)]
    assert turns[::2] == [turn["value"] for turn in talk["conversations"][::2]]
    asked = [
        json.loads(line)["question"] for line in (out / "answers" / "answers.jsonl").read_text().splitlines()
    ]
    assert asked == turns[::2]


def test_drawn_answers_are_the_same_in_any_batch(
    entries, shapes_dir: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    data = written(tmp_path / "all.json", entries)
    words = ["--relabel", "--temperature=1", "--seed=7", "--max_new_tokens=12"]
    for name, size in (("one", "1"), ("many", "6")):
        answer("label", data, shapes_dir, teacher_dir, tmp_path / name, *words, "--batch_size", size)
    one, many = ((tmp_path / name / "answers" / "answers.jsonl").read_text() for name in ("one", "many"))
    assert one == many
    assert len({json.loads(line)["answer"] for line in one.splitlines()}) > 1


def test_new_questions_about_an_image_come_once_and_can_then_be_labelled(
    entries, shapes_dir: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Ask two questions about the picture.\n\nAsk another.\n")
    known = entries[0]["conversations"][0]["value"].removeprefix("<image>\n")
    names = [raw["id"] for raw in entries]
    said = {
        f"{names[0]}~0": f"1. Is it red?\n2) {known}\n- Is it Red?\nSure!",
        f"{names[0]}~1": "Q: Where is it?",
        "~": "",
    }
    data, out = written(tmp_path / "all.json", entries), tmp_path / "out"
    assert told(said, "expand", data, shapes_dir, teacher_dir, out, "--prompts", str(prompts)) == 0
    made = records(out)
    assert [(one["id"], one["conversations"]) for one in made] == [
        (f"{names[0]}~0.0", [{"from": "human", "value": "<image>\nIs it red?"}]),
        (f"{names[0]}~1.0", [{"from": "human", "value": "<image>\nWhere is it?"}]),
    ]
    assert made[0]["elicited"]["prompt"] == "<image>\nAsk two questions about the picture."
    assert set(dropped(out).values()) == {"no line of it is a new question"}
    labelled = tmp_path / "labelled"
    assert told({"~": "yes"}, "label", out / "records.json", shapes_dir, teacher_dir, labelled) == 0
    assert records(labelled)[0]["elicited"]["of"]["how"] == "expand"
    prompts.write_text("What is <image>?")
    assert answer("expand", data, shapes_dir, teacher_dir, out, TOKENS, "--prompts", str(prompts)) == 2


def test_lines_of_an_answer_that_are_questions() -> None:
    text = '3. What is it?\n* "Who?"\nQuestion 2: how many?\nNo.\n?\n\nWHAT IS IT?\n(4) <image> Where?'
    assert questions_in(text, {"who?"}) == ["What is it?", "how many?", "Where?"]


def test_what_two_models_agree_on_stays(entries, shapes_dir: Path, teacher_dir: Path, tmp_path: Path) -> None:
    truths = {raw["id"]: raw["conversations"][1]["value"] for raw in entries}
    names = list(truths)
    said = {names[0]: truths[names[0]].upper() + ".", names[1]: "something else", names[2]: truths[names[2]]}
    said |= {"test": "no such answer"}
    entries[2]["elicited"] = {"how": "label", "model": "another"}
    data, out = written(tmp_path / "all.json", entries), tmp_path / "out"
    assert told(said, "curate", data, shapes_dir, teacher_dir, out, "--by=agreement") == 0
    made = records(out)
    assert [one["id"] for one in made] == [names[0], names[2]]
    assert made[0]["conversations"][1]["value"] == truths[names[0]]
    assert made[1]["elicited"]["of"] == {"how": "label", "model": "another"}
    assert dropped(out)[names[1]] == "the other model answers 'something else'"


def test_the_likeliest_answers_stay_by_share_or_by_value(
    entries, shapes_dir: Path, teacher_dir: Path, tmp_path: Path, capsys
) -> None:
    data, half, above = written(tmp_path / "all.json", entries), tmp_path / "half", tmp_path / "above"
    words = ["--by=likelihood", "--dtype=float32"]
    assert answer("curate", data, shapes_dir, teacher_dir, half, *words, "--keep=0.5") == 0
    lines = (half / "scores" / "judge.rank0.jsonl").read_text().splitlines()
    log_p = {one["id"]: -one["nll"] / one["tokens"] for one in map(json.loads, lines)}
    best = sorted(log_p, key=lambda name: -log_p[name])[:3]
    assert [one["id"] for one in records(half)] == [raw["id"] for raw in entries if raw["id"] in best]
    assert records(half)[0]["elicited"]["log_p"] == log_p[records(half)[0]["id"]]
    least = sorted(log_p.values())[-2]
    assert answer("curate", data, shapes_dir, teacher_dir, above, *words, f"--least={least}") == 0
    assert len(records(above)) == 2
    assert answer("curate", data, shapes_dir, teacher_dir, half, *words) == 2
    assert "needs either --keep" in capsys.readouterr().err
    entries[0]["conversations"][1]["value"] = "other"
    written(data, entries)
    assert answer("curate", data, shapes_dir, teacher_dir, half, *words, "--keep=0.5") == 2
    assert "holds the answers of another run (data" in capsys.readouterr().err


def test_a_judge_orders_a_students_answers_into_pairs(
    entries, shapes_dir: Path, teacher_dir: Path, student_dir: Path, tmp_path: Path, capsys
) -> None:
    data, out = written(tmp_path / "all.json", entries), tmp_path / "out"
    words = ["--student", str(student_dir), "--samples=3", "--max_new_tokens=4", "--dtype=float32"]
    assert answer("feedback", data, shapes_dir, teacher_dir, out, *words, "--margin=0") == 2
    for path in out.glob("answers?/answers.jsonl"):  # random weights end no answer: take them as they are
        path.write_text(path.read_text().replace(', "cut": "4"', ""))
    assert answer("feedback", data, shapes_dir, teacher_dir, out, *words, "--margin=0") == 0
    made = records(out)
    assert made
    candidates = {
        one["id"]: one["conversations"][-1]["value"]
        for one in json.loads((out / "candidates.json").read_text())
    }
    lines = map(json.loads, (out / "scores" / "judge.rank0.jsonl").read_text().splitlines())
    log_p = {one["id"]: -one["nll"] / one["tokens"] for one in lines}
    for one in made:
        own = {name: text for name, text in candidates.items() if name.startswith(one["id"] + "~")}
        assert one["chosen"]["value"] == own[max(own, key=log_p.__getitem__)]
        assert one["rejected"]["value"] == own[min(own, key=log_p.__getitem__)]
        assert one["scores"]["chosen"] > one["scores"]["rejected"]
        assert (
            one["conversations"] == entries[[e["id"] for e in entries].index(one["id"])]["conversations"][:1]
        )
    assert answer("feedback", data, shapes_dir, teacher_dir, out, *words, "--margin=1000") == 2
    assert any("of each other" in reason for reason in dropped(out).values())
    assert answer("feedback", data, shapes_dir, teacher_dir, out, *words, "--temperature=0") == 2
    assert "feedback needs different answers" in capsys.readouterr().err


def test_what_cannot_be_asked_is_named(shapes_dir: Path, tmp_path: Path) -> None:
    question = {"from": "human", "value": "<image>\nWhat?"}
    entries = [
        {"id": "open", "image": "images/a.jpg", "conversations": [question]},
        {"id": "out", "image": "../a.jpg", "conversations": [question]},
        {"id": "none", "conversations": []},
        7,
        {"id": "done", "image": "images/a.jpg", "conversations": [question, {"from": "gpt", "value": "x"}]},
    ]
    data = written(tmp_path / "data.json", entries)
    asked, left = read_asked(data, image_root=tmp_path, follow_symlinks=False, which="open")
    assert [one.record.id for one in asked] == ["open"]
    assert asked[0].record.turns[-1].text == OPEN
    assert [one.id for one in left] == ["out", "none", "3", "done"]
    with pytest.raises(ValueError, match="no usable record"):
        read_asked(written(data, entries[1:4]), image_root=tmp_path, follow_symlinks=False, which="open")


def test_prompts_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "prompts.bin"
    path.write_bytes(b"ask\xff")
    with pytest.raises(ValueError, match=r"prompts\.bin must be UTF-8 text, but byte 3 is not"):
        read_prompts(path)
