"""Rationales: how steps are read, what becomes of wrong ones, and what is written of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from llava_kd.curation.elicit.entries import Asked
from llava_kd.curation.elicit.making import Made
from llava_kd.curation.rationale.evidence import Check, Checks, Verdict
from llava_kd.curation.rationale.scenes import read_scene_graphs
from llava_kd.curation.rationale.steps import malformed, steps_of, text_of
from llava_kd.curation.rationale.verifying import Rules, rationales
from llava_kd.curation.rationale.words import read_facts
from llava_kd.data.sources.conversation import Record, Turn
from llava_kd.evaluation.generation.questions import Question

GRAPH = {
    "objects": [
        {"name": "circle", "attributes": {"colour": "red", "place": "top left"}},
        {"name": "star", "attributes": {"colour": "blue", "place": "bottom"}},
    ]
}
QUESTION = "What is red?"


@pytest.fixture
def checks(tmp_path: Path) -> Checks:
    path = tmp_path / "graphs.json"
    path.write_text(json.dumps({"a": GRAPH, "b": GRAPH, "green one": {"objects": [{"name": "square",
        "attributes": {"colour": "green"}}]}}))  # fmt: skip
    return Checks([read_scene_graphs(path)])


def asked(name: str = "a", truth: str = "circle") -> Asked:
    record = Record(id=name, images=(), turns=(Turn("user", QUESTION), Turn("assistant", truth)))
    return Asked(record=record, questions=(Question(id=name, text=QUESTION, truth=truth),))


class Script:
    """What a model writes, round by round; and what it was asked."""

    def __init__(self, *rounds: str | Mapping[str, str]) -> None:
        self.rounds = rounds
        self.asked: list[list[Question]] = []

    def __call__(self, questions: Sequence[Question], number: int) -> dict[str, Mapping[str, str]]:
        self.asked.append(list(questions))
        said = self.rounds[number]
        answers = [said if isinstance(said, str) else said[q.id.partition("~")[0]] for q in questions]
        cut = ("cut off", "cut")
        return {
            q.id: {"id": q.id, "answer": text, **({"cut": "9"} if text.startswith(cut) else {})}
            for q, text in zip(questions, answers, strict=True)
        }


def made(script: Script, checks: Checks, *records: Asked, is_greedy: bool = True, **rules) -> Made:
    rules = {"prompt": "", **rules}
    origin = {"how": "rationale"}
    return rationales(
        script, records or [asked()], checks, Rules(**rules), is_greedy=is_greedy, origin=origin
    )


def text(made: Made) -> str:
    (entry,) = made.entries
    return entry["conversations"][-1]["value"]  # type: ignore[index]


def told(made: Made) -> dict:
    (entry,) = made.entries
    return entry["elicited"]  # type: ignore[return-value]


GOOD = "The circle is red.\nThe star is blue.\nAnswer: circle"


def test_a_text_is_taken_apart_and_put_together_again() -> None:
    said = "1. The circle is red. It is large.\n\n- Step 2: The star is blue.\n(3) Answer:  Circle. Yes"
    steps = steps_of(said)
    assert [step.claim for step in steps] == [
        "The circle is red.",
        "It is large.",
        "The star is blue.",
        "Circle. Yes",
    ]
    assert [step.is_answer for step in steps] == [False, False, False, True]
    assert text_of(steps) == said.replace("\n\n", "\n")


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("", "empty"),
        (" \n ", "empty"),
        ("The circle is red.", "begins with 'Answer:'"),
        ("The circle is red.\nAnswer: circle\nThe star is blue.", "1 steps follow"),
        ("The circle is red.\nAnswer:", "nothing follows"),
        ("Answer: circle", "without a step"),
    ],
)
def test_what_is_no_stepwise_answer_says_why(said: str, why: str) -> None:
    assert why in malformed(steps_of(said))


def test_a_right_rationale_is_kept_as_it_is_and_says_what_was_verified(checks: Checks) -> None:
    script = Script(GOOD)
    result = made(script, checks)
    assert text(result) == GOOD
    origin = told(result)
    assert (origin["rounds"], origin["steps"], origin["verified"], origin["unverified"]) == (0, 2, 2, 0)
    assert (origin["corrections"], origin["prompt"], origin["how"]) == ([], QUESTION, "rationale")
    assert len(script.asked) == 1


def test_what_follows_a_wrong_step_is_forgotten_and_written_anew_behind_the_corrected_one(
    checks: Checks,
) -> None:
    script = Script(
        "The circle is blue.\nThe star is red.\nAnswer: star", "The star is blue.\nAnswer: circle"
    )
    result = made(script, checks)
    assert text(result) == GOOD  # neither the wrong star nor the stale answer is left
    again = script.asked[1][0]
    assert again.begun == "The circle is red.\n"
    assert (again.text, again.id) == (QUESTION, "a~1")
    (correction,) = told(result)["corrections"]
    assert correction == {
        "step": 1,
        "round": 1,
        "was": "The circle is blue.",
        "by": "scene graphs",
        "fact": "circle: red",
        "became": "The circle is red.",
    }
    assert told(result)["rounds"] == 1


def test_a_wrong_step_that_is_written_anew_is_checked_again_and_three_rounds_are_the_most(
    checks: Checks,
) -> None:
    wrong = "The star is red.\nAnswer: star"
    script = Script("The circle is blue.\n" + wrong, *[wrong] * 9)
    result = made(script, checks)
    # Round 1 finds the star wrong, and corrects it; round 2 begins behind it and finds another wrong star.
    assert [one[0].begun for one in script.asked] == [
        "",
        "The circle is red.\n",
        "The circle is red.\nThe star is blue.\n",
        "The circle is red.\nThe star is blue.\nThe star is blue.\n",
    ]
    assert not result.entries
    assert result.dropped[0].reason.startswith("after 3 rounds step 4 is wrong: 'The star is red.'")


def test_without_rounds_a_wrong_step_drops_the_record_and_nothing_is_written_anew(checks: Checks) -> None:
    script = Script({"a": "The circle is blue.\nAnswer: star", "b": GOOD})
    result = made(script, checks, asked("a"), asked("b"), rounds=0)
    assert [entry["id"] for entry in result.entries] == ["b"]
    assert result.dropped[0].reason == "step 1 is wrong: 'The circle is blue.', and circle: red"
    assert len(script.asked) == 1
    with pytest.raises(ValueError, match="rounds must lie from 0"):
        Rules(rounds=-1)


def test_a_wrong_step_that_nothing_corrects_is_left_out_and_drawn_anew_but_never_repeated_greedily(
    checks: Checks,
) -> None:
    wrong = "The circle is red.\nThere is a square.\nAnswer: square"
    kept = made(Script(wrong, "The star is blue.\nAnswer: circle"), checks, is_greedy=False)
    assert text(kept) == GOOD
    assert told(kept)["corrections"][0]["became"] is None
    dropped = made(Script(wrong), checks).dropped
    assert "no evidence corrects it, and greedy writing repeats it" in dropped[0].reason


def test_a_step_that_no_evidence_reads_is_kept_and_counted_or_drops_the_record(checks: Checks) -> None:
    said = GOOD.replace("\n", "\nRed is a warm colour.\n", 1)
    kept = made(Script(said), checks)
    assert text(kept) == said
    assert (told(kept)["verified"], told(kept)["unverified"]) == (2, 1)
    (dropped,) = made(Script(said), checks, unread="drop").dropped
    assert dropped.reason == "no evidence can check its step 2: 'Red is a warm colour.'"
    (dropped,) = made(Script("Red is warm.\nAnswer: circle"), checks).dropped
    assert dropped.reason == "no evidence can check any of its 1 steps"


def test_a_model_that_writes_nothing_or_does_not_end_gives_no_record(checks: Checks) -> None:
    script = Script({"a": "  ", "b": "cut off in its only step and so on and on"})
    reasons = {one.id: one.reason for one in made(script, checks, asked("a"), asked("b")).dropped}
    assert reasons["a"] == "the answer is empty"
    assert "cut off after 9 tokens" in reasons["b"]
    nothing_more = made(Script("The circle is blue.\nAnswer: star", ""), checks).dropped
    assert nothing_more[0].reason == "the answer is empty"


def test_a_record_without_evidence_is_dropped_before_anything_is_written(checks: Checks) -> None:
    script = Script(GOOD)
    result = made(script, checks, asked("a"), asked("unknown"))
    assert [q.id for q in script.asked[0]] == ["a"]
    assert (result.dropped[0].id, result.dropped[0].reason) == ("unknown", "no evidence is about it")


def test_true_answers_are_those_of_the_data(checks: Checks) -> None:
    said = {"a": GOOD, "b": GOOD}
    result = made(Script(said), checks, asked("a"), asked("b", "star"), true_answers=True)
    assert [entry["id"] for entry in result.entries] == ["a"]
    assert result.dropped[0].reason == "its answer is 'circle', and that of the data is 'star'"


def test_a_sentence_in_the_middle_of_a_line_goes_on_in_it(checks: Checks) -> None:
    script = Script("The circle is blue. The star is red.\nAnswer: star", "The star is blue.\nAnswer: circle")
    result = made(script, checks)
    assert script.asked[1][0].begun == "The circle is red."
    assert text(result) == "The circle is red. The star is blue.\nAnswer: circle"


def test_the_prompt_is_asked_and_kept_with_the_record(checks: Checks) -> None:
    script = Script(GOOD)
    result = made(script, checks, prompt="Step by step.")
    assert script.asked[0][0].text == f"{QUESTION}\nStep by step."
    (entry,) = result.entries
    assert entry["conversations"][0]["value"] == f"{QUESTION}\nStep by step."  # type: ignore[index]


class Hearsay:
    """Evidence of a user's own, which corrects to what is not so."""

    name = "hearsay"
    fingerprint = "1"
    keys = None

    def about(self, record: Record) -> Check:
        return lambda claim: (
            Verdict(holds=False, fact="it is said", correction="The circle is blue.")
            if claim == "It is a circle."
            else None
        )


def test_a_correction_that_the_evidence_does_not_bear_out_is_none(checks: Checks) -> None:
    both = Checks([Hearsay(), *checks.evidence])
    script = Script("It is a circle.\nAnswer: circle", GOOD)
    assert "no evidence corrects it" in made(script, both).dropped[0].reason
    drawn = made(Script("It is a circle.\nAnswer: circle", GOOD), both, is_greedy=False)
    assert text(drawn) == GOOD


def test_the_first_evidence_that_can_read_a_step_decides(checks: Checks, tmp_path: Path) -> None:
    path = tmp_path / "facts.csv"
    path.write_text("subject,relation,object\nthe circle,is,blue\nthe star,is,red\n")
    facts = read_facts(path)
    assert made(Script(GOOD), Checks([*checks.evidence, facts])).entries
    (dropped,) = made(Script(GOOD), Checks([facts, *checks.evidence]), rounds=0).dropped
    assert dropped.reason == "step 1 is wrong: 'The circle is red.', and the circle, is: blue"


def test_evidence_that_names_none_of_the_records_is_refused(checks: Checks) -> None:
    records = [asked("x").record]
    with pytest.raises(ValueError, match=r"scene graphs name no record of d\.json: they are about 'a', 'b'"):
        checks.check_records(records, "d.json")
    checks.check_records([asked("a").record], "d.json")
    with pytest.raises(ValueError, match="steps are checked against evidence"):
        Checks([])
