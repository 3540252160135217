"""`llava-kd data rationale`: evidence files, rounds on disk, and a call that is cut short and goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llava_kd.cli import main
from llava_kd.data.sources.llava_json import LlavaJson
from llava_kd.evaluation.generation.generate import Generator
from llava_kd.evaluation.generation.prompt import render_talk
from llava_kd.evaluation.generation.questions import Question, fingerprint
from llava_kd.models.files.checkpoint import load_processor

QUICKSTART = Path(__file__).parents[1] / "scripts/quickstart/backbones/teacher"
RIGHT = "The circle is red.\nAnswer: circle"
WRONG = "The circle is blue.\nThe star is red.\nAnswer: star"


@pytest.fixture
def names(shapes_dir: Path) -> list[str]:
    return [raw["id"] for raw in json.loads((shapes_dir / "test.json").read_text())]


@pytest.fixture
def graphs(names: list[str], tmp_path: Path) -> Path:
    objects = [{"name": "circle", "attributes": {"colour": "red"}}]
    objects += [{"name": "star", "attributes": {"colour": "blue"}}]
    path = tmp_path / "graphs.json"
    path.write_text(json.dumps({name: {"objects": objects} for name in names[:5]}))
    return path


def call(shapes: Path, model: Path, out: Path, graphs: Path, *words: str) -> int:
    given = ["--data", str(shapes / "test.json"), "--model", str(model), "--out", str(out)]
    small = ["--device=cpu", "--batch_size=2", "--max_new_tokens=6", "--prompt="]
    return main(["data", "rationale", *given, *small, "--scene_graphs", str(graphs), *words])


def say(out: Path, number: int, said: Mapping[str, str], otherwise: str) -> None:
    """Other answers of a round, as a model of more than random weights gives them."""
    path = out / f"answers{number}" / "answers.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["answer"] = said.get(line["id"].partition("~")[0], otherwise)
        line.pop("cut", None)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def records(out: Path) -> list[dict]:
    return json.loads((out / "records.json").read_text())


def reasons(out: Path) -> dict[str, str]:
    lines = (json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines())
    return {one["id"]: one["reason"] for one in lines}


def three_calls(
    shapes: Path, model: Path, out: Path, graphs: Path, names: list[str], monkeypatch=None
) -> list[str]:
    """Two rounds, with what the model itself wrote in each; every call once killed at its second batch."""
    own = []
    for number, said in enumerate(({names[0]: RIGHT}, {names[1]: "The star is blue.\nAnswer: circle"}, {})):
        if monkeypatch is not None and number < 2:
            killed_at_second_batch(shapes, model, out, graphs, monkeypatch)
        call(shapes, model, out, graphs)
        if number < 2:
            own.append((out / f"answers{number}" / "answers.jsonl").read_text())
            say(out, number, said, WRONG if number == 0 else "")
    return own


def killed_at_second_batch(shapes: Path, model: Path, out: Path, graphs: Path, monkeypatch) -> None:
    decode, calls = Generator.decode, []

    def dies(self, ids_BN):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return decode(self, ids_BN)

    with monkeypatch.context() as patch:
        patch.setattr(Generator, "decode", dies)
        assert call(shapes, model, out, graphs) == 130
    assert len(calls) == 2


def test_a_call_that_was_cut_short_in_either_round_ends_as_one_that_was_not(
    shapes_dir: Path, teacher_dir: Path, graphs: Path, names: list[str], tmp_path: Path, monkeypatch, capsys
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    in_one = three_calls(shapes_dir, teacher_dir, whole, graphs, names)
    in_parts = three_calls(shapes_dir, teacher_dir, cut, graphs, names, monkeypatch)
    assert in_one == in_parts
    for name in ("records.json", "dropped.jsonl", "elicited.json"):
        assert (whole / name).read_text() == (cut / name).read_text()
    made = records(whole)
    assert [one["id"] for one in made] == names[:2]
    assert made[0]["conversations"][-1]["value"] == RIGHT
    assert made[1]["conversations"][-1]["value"] == "The circle is red.\nThe star is blue.\nAnswer: circle"
    origin = made[1]["elicited"]
    assert (origin["how"], origin["model"], origin["rounds"]) == ("rationale", str(teacher_dir), 1)
    assert origin["corrections"][0]["by"] == "scene graphs"
    left = reasons(whole)
    assert left[names[5]] == "no evidence is about it"
    assert set(left) == set(names[2:])
    summary = json.loads((whole / "elicited.json").read_text())
    assert (summary["records"], summary["dropped"], summary["corrections"]) == (2, 4, {"scene graphs": 1})
    assert "2 records in" in capsys.readouterr().out
    source = LlavaJson(whole / "records.json", shapes_dir)
    assert [source.record(i).fault for i in range(len(source))] == ["", ""]


def test_another_setting_or_evidence_does_not_go_on_in_the_same_folder(
    shapes_dir: Path, teacher_dir: Path, graphs: Path, names: list[str], tmp_path: Path, monkeypatch, capsys
) -> None:
    out = tmp_path / "out"
    assert call(shapes_dir, teacher_dir, out, graphs) == 2  # what random weights write is no rationale
    assert "no record is left of 6" in capsys.readouterr().err
    monkeypatch.setattr(Generator, "load", None)
    say(out, 0, {}, RIGHT)
    assert call(shapes_dir, teacher_dir, out, graphs) == 0
    for words in (["--rounds=1"], ["--unread=drop"], ["--true_answers"], ["--prompt=Why?"]):
        assert call(shapes_dir, teacher_dir, out, graphs, *words) == 2
        assert "holds the answers of another run" in capsys.readouterr().err
    graphs.write_text(graphs.read_text().replace("blue", "green"))
    assert call(shapes_dir, teacher_dir, out, graphs) == 2
    assert "another run (evidence" in capsys.readouterr().err


def test_what_cannot_be_is_answered_before_a_model_is_read(
    shapes_dir: Path, teacher_dir: Path, graphs: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(Generator, "load", None)
    out = tmp_path / "out"
    others = tmp_path / "others.json"
    others.write_text(graphs.read_text().replace('"test_', '"other_'))
    assert call(shapes_dir, teacher_dir, out, others) == 2
    assert "the scene graphs name no record of" in capsys.readouterr().err
    given = ["--data", str(shapes_dir / "test.json"), "--model", str(teacher_dir), "--out", str(out)]
    assert main(["data", "rationale", *given]) == 2
    assert (
        "needs evidence for the steps; give at least one of --scene_graphs, --boxes"
        in capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        call(shapes_dir, teacher_dir, out, graphs, "--rounds=-1")


def test_a_begun_answer_is_shown_as_training_shows_it_and_its_rest_is_what_was_left() -> None:
    processor = load_processor(str(QUICKSTART))
    talk = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "It is red.\nSo be it."}]
    whole = processor.apply_chat_template(talk, tokenize=False)
    for begun in ("It", "It is red.\n", "It is red.\nSo"):
        prompt = render_talk(processor, talk[:1], begun=begun)
        assert prompt.endswith(begun)
        assert whole.startswith(prompt)
    assert render_talk(processor, talk[:1], begun="a <image> b").endswith("b")
    assert not whole.startswith(render_talk(processor, talk[:1]) + "It")  # the template puts a space


def test_a_model_goes_on_with_a_begun_answer_as_it_would_have(shapes_dir: Path) -> None:
    generator = Generator.load(QUICKSTART, device=torch.device("cpu"))
    asked = []
    for talk in json.loads((shapes_dir / "instructions.json").read_text()):
        turns = [turn["value"].removeprefix("<image>\n") for turn in talk["conversations"]]
        asked += [
            Question(id=f"q{len(asked)}", text=f"<image>\n{text}", images=(shapes_dir / talk["image"],))
            for text, truth in zip(turns[::2], turns[1::2], strict=True)
            if len(truth.split()) == 2
        ]
    answers = zip(asked, generator.answer(asked), strict=True)
    two_words = [(question, text.split()) for question, text in answers if len(text.split()) == 2]
    assert len(two_words) > 3
    begun = [replace(question, begun=words[0]) for question, words in two_words]
    assert generator.answer(begun) == [words[1] for _, words in two_words]
    assert fingerprint(begun) != fingerprint([question for question, _ in two_words])
