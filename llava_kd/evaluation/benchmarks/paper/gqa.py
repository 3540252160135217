"""GQA testdev-balanced: exact match, as the official eval.py counts accuracy after LLaVA's conversion."""

from __future__ import annotations

from collections import defaultdict
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
    of_kind,
    read_json,
    read_jsonl,
    with_image,
)
from llava_kd.evaluation.generation.questions import Question, image_path

QUESTIONS = "gqa/llava_gqa_testdev_balanced.jsonl"
ANNOTATIONS = "gqa/testdev_balanced_questions.json"
IMAGES = "gqa/images"


def convert(text: str) -> str:
    """LLaVA's conversion: no final periods, lower case; outer space stays and costs the match."""
    return text.rstrip(".").lower()


def read(root: Path, quirks: Quirks) -> list[Question]:
    path = need(root, QUESTIONS, "gqa")
    questions = []
    for number, row in enumerate(read_jsonl(path), start=1):
        name = str(field_of(row, "question_id", path, number))
        file = image_path(root / IMAGES, field_of(row, "image", path, number, str), owner=f"gqa {name}")
        questions.append(
            Question(id=name, text=with_image(field_of(row, "text", path, number, str)), images=(file,))
        )
    return questions


def score(root: Path, questions: Sequence[Question], answers: Answers, quirks: Quirks) -> Score:
    path = need(root, ANNOTATIONS, "gqa")
    rows = {name: of_kind(row, dict, f"{path}: entry {name}") for name, row in read_json(path, dict).items()}
    annotations = {name: row for name, row in rows.items() if row.get("isBalanced", True)}
    notes = [*missing_note(questions, answers)]
    asked = {question.id for question in questions}
    if unasked := [name for name in annotations if name not in asked]:
        notes.append(f"{len(unasked)} annotated questions are not in {QUESTIONS} and do not count")
    if unknown := [q.id for q in questions if q.id not in annotations]:
        raise ValueError(f"{path} has no annotation of {len(unknown)} questions, the first is {unknown[0]}")
    items, kinds = [], defaultdict(list)
    for question in questions:
        row = annotations[question.id]
        answer = answers.get(question.id, "")
        reading, truth = convert(answer), str(field_of(row, "answer", path, question.id))
        right = float(question.id in answers and reading == truth)
        items.append(Item(id=question.id, answer=answer, reading=reading, truth=truth, score=right))
        types = field_of(row, "types", path, question.id, dict) if "types" in row else {}
        structural = str(types.get("structural", ""))
        kinds["open" if structural == "query" else "binary"].append(right)
        kinds[f"structural {structural}"].append(right)
    return Score(
        value=100 * mean([item.score for item in items]),
        parts={kind: 100 * mean(scores) for kind, scores in sorted(kinds.items())},
        items=tuple(items),
        notes=tuple(notes),
    )


BENCHMARK = Benchmark(
    name="gqa",
    column="GQA",
    files=(QUESTIONS, ANNOTATIONS),
    images=IMAGES,
    num_questions=12_578,
    max_new_tokens=128,
    read=read,
    score=score,
)
