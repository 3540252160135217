"""POPE: yes or no about objects, in three categories; labels are joined by image and question."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llava_kd.evaluation.benchmarks.base import (
    Answers,
    Benchmark,
    Item,
    Quirks,
    Score,
    field_of,
    mean,
    missing_note,
    need,
    read_jsonl,
    with_image,
    without_suffix,
)
from llava_kd.evaluation.generation.questions import Question, image_path
from llava_kd.evaluation.scorers.yes_no import Confusion, pope_says_yes

QUESTIONS = "pope/llava_pope_test.jsonl"
LABELS = "pope/coco/coco_pope_{}.json"
CATEGORIES = ("random", "popular", "adversarial")
IMAGES = "pope/val2014"


def read(root: Path, quirks: Quirks) -> list[Question]:
    """Questions with their labels; files of two releases are refused."""
    path = need(root, QUESTIONS, "pope")
    rows = read_jsonl(path)
    ids = [str(field_of(row, "question_id", path, number)) for number, row in enumerate(rows, start=1)]
    by_category = len(set(ids)) < len(ids)  # the ids of some files start anew in each category
    wanted = {category: labels(root, category) for category in CATEGORIES}
    questions: list[Question] = []
    for number, (name, row) in enumerate(zip(ids, rows, strict=True), start=1):
        category, image, text = (str(field_of(row, k, path, number)) for k in ("category", "image", "text"))
        if category not in CATEGORIES:
            raise ValueError(f"{path}, line {number}: category must be one of {CATEGORIES}, got {category!r}")
        left = wanted[category].get((image, without_suffix(text)))
        if not left:
            raise ValueError(_mismatch(root, category, f"question {name} has no label"))
        questions.append(
            Question(
                id=f"{category} {name}" if by_category else name,
                text=with_image(text),
                images=(image_path(root / IMAGES, image, owner=f"pope {name}"),),
                truth=left.pop(0),
                kind=category,
                extra={"source_id": name},
            )
        )
    for category, found in wanted.items():
        if left_over := sum(map(len, found.values())):
            raise ValueError(_mismatch(root, category, f"{left_over} labels have no question"))
    return questions


def labels(root: Path, category: str) -> dict[tuple[str, str], list[str]]:
    """Labels of a category by image and question; the same question may come twice."""
    path = need(root, LABELS.format(category), "pope")
    found: dict[tuple[str, str], list[str]] = {}
    for number, row in enumerate(read_jsonl(path), start=1):
        image, text, label = (str(field_of(row, key, path, number)) for key in ("image", "text", "label"))
        if label not in ("yes", "no"):
            raise ValueError(f"{path}, line {number}: label must be yes or no, got {label!r}")
        found.setdefault((image, text.strip()), []).append(label)
    return found


def score(root: Path, questions: Sequence[Question], answers: Answers, quirks: Quirks) -> Score:
    """Mean F1 of the categories (LLaVA's headline); the mean accuracy, TinyLLaVA's, is among the parts."""
    items, counts = [], {}
    for category in CATEGORIES:
        pairs = []
        for question in (q for q in questions if q.kind == category):
            label, answer = question.truth, answers.get(question.id)
            says = "none" if answer is None else "yes" if pope_says_yes(answer) else "no"
            # No answer is the wrong answer: the official script would shift every later one.
            predicted = label == "no" if says == "none" else says == "yes"
            pairs.append((predicted, label == "yes"))
            right = float(says == label)
            items.append(Item(id=question.id, answer=answer or "", reading=says, truth=label, score=right))
        counts[category] = Confusion.of(pairs)
    parts = {}
    for category, count in counts.items():
        parts |= {f"{category} F1": 100 * count.f1, f"{category} accuracy": 100 * count.accuracy}
        parts |= {f"{category} precision": 100 * count.precision, f"{category} recall": 100 * count.recall}
        parts[f"{category} yes ratio"] = 100 * count.yes_ratio
    parts["mean F1"] = 100 * mean([count.f1 for count in counts.values()])
    parts["mean accuracy"] = 100 * mean([count.accuracy for count in counts.values()])
    notes = [*missing_note(questions, answers)]
    if silent := [c for c, count in counts.items() if count.tp + count.fp == 0]:
        notes.append(f"no yes was predicted in {', '.join(silent)}: F1 is 0 (the official script stops)")
    return Score(value=parts["mean F1"], parts=parts, items=tuple(items), notes=tuple(notes))


def _mismatch(root: Path, category: str, what: str) -> str:
    return (
        f"{root / QUESTIONS} and {root / LABELS.format(category)} are of different releases: {what}. The "
        "random category has 2,910 rows in one and 3,000 in another; take the labels of POPE commit e3e39262 "
        "for LLaVA's question file"
    )


BENCHMARK = Benchmark(
    name="pope",
    column="POPE",
    files=(QUESTIONS, *(LABELS.format(category) for category in CATEGORIES)),
    images=IMAGES,
    num_questions=8_910,
    max_new_tokens=128,
    read=read,
    score=score,
    other_counts=(9_000,),
)
