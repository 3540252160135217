"""Scoring rules: published vectors where they are at hand, the official quirks, and identities."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_kd.evaluation.scorers.choice import mmbench_option, mmmu_choice, scienceqa_option
from llava_kd.evaluation.scorers.exact import is_correct
from llava_kd.evaluation.scorers.open_answer import is_open_correct, matches_gold, normalise_open
from llava_kd.evaluation.scorers.vqa_text import (
    CONTRACTIONS,
    normalise_m4c,
    normalise_vqa,
    soft_accuracy,
    textvqa_accuracy,
    vizwiz_accuracy,
    vqa_accuracy,
)
from llava_kd.evaluation.scorers.yes_no import (
    PERCEPTION,
    Confusion,
    mme_reading,
    mme_task_score,
    pope_says_yes,
)

VECTORS = Path(__file__).parents[2] / "shared" / "cases" / "scorer_cases.json"


def vectors(group: str) -> list[dict]:
    """Cases of one group, or a skip where the file of published vectors is not beside the repository."""
    if not VECTORS.is_file():
        pytest.skip(f"no published vectors at {VECTORS}")
    groups = {g["id"]: g["cases"] for g in json.loads(VECTORS.read_text(encoding="utf-8"))["groups"]}
    return groups[group]


def test_exact_answers_are_compared_as_composed_unicode() -> None:
    """A file written on macOS may hold a letter and its accent apart, which most tokenizers join."""
    assert is_correct("gr\u00fcn.", "Gru\u0308n")
    assert not is_correct("grun", "Gru\u0308n")


def test_published_vqa_normalisation() -> None:
    for case in vectors("vqa_answer_normalisation"):
        assert normalise_vqa(case["input"]) == case["expected"], case
        assert normalise_m4c(case["input"]) == case["expected"], case


def test_published_m4c_processor() -> None:
    for case in vectors("m4c_evalai_answer_processor"):
        assert normalise_m4c(case["input"]) == case["expected"], case


def test_published_differences_of_the_two_normalisers() -> None:
    for case in vectors("m4c_vs_official_divergence"):
        assert normalise_vqa(case["input"]) == case["vqa_official"], case
        assert normalise_m4c(case["input"]) == case["m4c"], case


def test_published_soft_accuracy() -> None:
    for case in vectors("vqa_soft_accuracy"):
        assert vqa_accuracy(case["prediction"], case["answers"]) == pytest.approx(case["expected"], abs=1e-9)
        assert textvqa_accuracy(case["prediction"], case["answers"]) == pytest.approx(
            case["expected"], abs=1e-9
        )


def test_published_mmmu_choices() -> None:
    for case in vectors("mmmu_parse_multi_choice"):
        found = mmmu_choice(case["response"], list(case["index2ans"]), case["index2ans"])
        assert (found.letter, found.is_guess) == (case["expected"], False), case


def test_published_mmmu_open_judgements() -> None:
    for case in vectors("mmmu_open_judgement"):
        assert is_open_correct(case["response"], case["gold"]) == case["expected_correct"], case


def test_published_mmmu_subjects() -> None:
    for name, subject in vectors("mmmu_eval_only_subjects").items():  # type: ignore[attr-defined]
        right = [_mmmu_is_right(item) for item in subject["items"]]
        assert round(sum(right) / len(right), 3) == pytest.approx(
            subject["expected_acc_rounded_3"], abs=5e-4
        ), name


def _mmmu_is_right(item: dict) -> bool:
    """By the official main_eval_only.py: predictions are parsed already, open ones normalised as they are."""
    if item["type"] == "multiple-choice":
        return (
            item["prediction"] in item["gold"]
            if isinstance(item["gold"], list)
            else item["prediction"] == item["gold"]
        )
    given = item["prediction"] if isinstance(item["prediction"], list) else [item["prediction"]]
    return matches_gold({value for text in given for value in normalise_open(str(text))}, item["gold"])


def test_published_scienceqa_options() -> None:
    for case in vectors("sqa_option_extraction"):
        assert scienceqa_option(case["output"], 5) == case["expected_index"], case


def test_published_pope_metrics() -> None:
    for case in vectors("pope_metrics_from_counts"):
        counts = Confusion(tp=case["TP"], fp=case["FP"], tn=case["TN"], fn=case["FN"])
        assert counts.total == case["n"]
        for key in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
            if key in case:
                assert vars(type(counts))[key].fget(counts) == pytest.approx(case[key], abs=1e-12), case


def test_published_totals_of_pope_and_mme() -> None:
    for case in vectors("pope_headline_average"):
        assert sum(case["f1"]) / 3 == pytest.approx(case["expected_mean"], abs=1e-12)
    for case in vectors("mme_perception_sum"):
        assert sum(case["subtasks"][task] for task in PERCEPTION) == pytest.approx(case["expected_total"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Three Cats!", "3 cats"),
        ("it's 1,000.5 -ish", "it's 1000.5 ish"),
        ("dont wont Im", "don't won't im"),
        ("somebody'd ow's'at", "somebodyd 'ow's'at"),
        ("5. 3.5 .5", "5 3.5 .5"),
        ("." * 40, "." * 8),
        ("yes\nno\tmaybe", "yes no maybe"),
        ("none of one", "0 of 1"),
        ("red/blue", "red blue"),
        ("red /blue", "red blue"),
    ],
)
def test_vqa_normalisation_keeps_the_official_quirks(text: str, expected: str) -> None:
    assert normalise_vqa(text) == expected


def test_contractions_have_the_official_size() -> None:
    # 120 published entries less 6 that can never match or change nothing: two that map to
    # themselves and four with a capital I.
    assert len(CONTRACTIONS) == 114


def test_soft_accuracy_by_matches() -> None:
    scores = [soft_accuracy(matches, 10) for matches in range(11)]
    assert scores == pytest.approx([0, 0.3, 0.6, 0.9] + [1.0] * 7)


@given(st.lists(st.sampled_from(["a b", "b", "c", "Two"]), min_size=10, max_size=10), st.randoms())
def test_accuracy_does_not_depend_on_the_order_of_humans(humans: list[str], rng: random.Random) -> None:
    shuffled = rng.sample(humans, len(humans))
    for score in (vqa_accuracy, vizwiz_accuracy, textvqa_accuracy):
        assert score("b", humans) == score("b", shuffled)


def test_identical_humans_are_not_normalised_unless_asked() -> None:
    humans = ["yes"] * 10
    assert vqa_accuracy("Yes", humans) == 0
    assert vqa_accuracy("yes", humans) == 1
    assert vqa_accuracy("Yes.", humans, skip_identical=False) == 1
    assert vqa_accuracy("Yes", [*humans[:9], "no"]) == 1


def test_vizwiz_leaves_the_humans_as_they_are() -> None:
    humans = ["unanswerable"] * 4 + ["Coke"] * 6
    assert vizwiz_accuracy("Unanswerable.", humans) == 1
    assert vizwiz_accuracy("Coke", humans) == 0


def test_textvqa_needs_ten_humans() -> None:
    with pytest.raises(ValueError, match="10 human answers, got 9"):
        textvqa_accuracy("x", ["x"] * 9)


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("B", 1), ("B. because", 1), ("The answer is C.", 2), ("(B) dog", -1), ("B.", -1), ("b", -1),
        ("B.x", -1), ("The answer is B", -1), ("The answer is A. The answer is B.", -1), ("E", -1), ("", -1),
    ],
)  # fmt: skip
def test_scienceqa_reads_letters_as_llava_does(text: str, index: int) -> None:
    assert scienceqa_option(text, 4) == index


OPTIONS = {"A": "a cat", "B": "a dog", "C": "None", "D": "the red house"}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), ("B.", "B"), ("(B)", "B"), ("The answer is B", "B"), ("b", ""), ("A or B", ""),
        ("It is a dog", "B"), ("a cat and a dog", ""), ("", ""), ("none", "C"),
        ("B was my first thought but then I looked twice at it", ""),
        ("The answer is B as far as anyone could tell from this one picture", "B"),
    ],
)  # fmt: skip
def test_mmbench_letters(text: str, letter: str) -> None:
    assert mmbench_option(text, OPTIONS) == letter


@pytest.mark.parametrize(
    "text", ["B\u3002", "\u9009B", "\u7b54\u6848\u662fB\u3002", "\uff08B\uff09", "B\uff1a\u5bf9", "\uff22"]
)
def test_mmbench_reads_chinese_answers(text: str) -> None:
    assert mmbench_option(text, OPTIONS) == "B"
    assert mmbench_option(text, OPTIONS, chinese=False) == ""


def test_mmmu_takes_the_last_option_and_guesses_only_when_told() -> None:
    texts = {"A": "zinc", "B": "iron oxide"}
    assert mmmu_choice("(A) no, rather (B)", "AB", texts).letter == "B"
    assert mmmu_choice("it is A I think, not iron", "AB", texts).letter == "A"
    assert mmmu_choice("well that would have to be Iron Oxide", "AB", texts).letter == "B"
    assert mmmu_choice("iron oxide", "AB", texts) == mmmu_choice("no idea", "AB", texts)
    assert mmmu_choice("I would say iron oxide", "AB", texts).is_guess
    guess = mmmu_choice("no idea", "AB", texts, guess=random.Random(42))
    assert guess.is_guess
    assert guess.letter == random.Random(42).choice("AB")


@pytest.mark.parametrize(
    ("response", "gold", "is_right"),
    [
        ("0.956", "0.963", True), ("The answer is 24.3", "24.32", False), ("x = 1,000", "1000", True),
        ("so it is Paris", ["paris", "Lyon"], True), ("nothing", "n", False), ("it is n", "n", True),
        ("v = abc", "v", False), ("v = abc\nw", "v", True),
    ],
)  # fmt: skip
def test_mmmu_open_answers(response: str, gold: str | list[str], is_right: bool) -> None:
    assert is_open_correct(response, gold) == is_right


@pytest.mark.parametrize(
    ("text", "is_yes"),
    [
        ("Yes", True), ("No, there is not", False), ("No.", False), ("Yes. No", True), ("", True),
        ("NO", True), ("no\n", True), ("there is not one", False), ("nothing", True),
    ],
)  # fmt: skip
def test_pope_reads_answers_as_llava_does(text: str, is_yes: bool) -> None:
    assert pope_says_yes(text) == is_yes


def test_pope_without_a_positive_prediction_has_no_f1() -> None:
    counts = Confusion.of([(False, True), (False, False)])
    assert (counts.precision, counts.recall, counts.f1, counts.accuracy) == (0, 0, 0, 0.5)


@pytest.mark.parametrize(
    ("text", "reading"),
    [("Yes", "yes"), ("yes, it is", "yes"), ("No.", "no"), ("not", "no"), ("nope", "no"),
     ("unknown", "other"), ("a no", "no"), ("", "other"), ("Well, yes", "other")],
)  # fmt: skip
def test_mme_reads_the_first_four_letters(text: str, reading: str) -> None:
    assert mme_reading(text) == reading


def test_mme_counts_answers_and_whole_images() -> None:
    assert mme_task_score([(True, True), (True, False)]) == 75 + 50
    assert mme_task_score([(True, True)]) == 200
