"""ScienceQA: the letter by LLaVA's rule; the papers print the accuracy over questions with an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llava_kd.evaluation.benchmarks.base import (
    LETTER,
    Answers,
    Benchmark,
    Item,
    Quirks,
    Score,
    field_of,
    mean,
    missing_note,
    need,
    read_json,
    with_image,
)
from llava_kd.evaluation.generation.questions import Question, image_path
from llava_kd.evaluation.scorers.choice import scienceqa_option

QUESTIONS = "scienceqa/llava_test_CQM-A.json"
PROBLEMS = "scienceqa/problems.json"
SPLITS = "scienceqa/pid_splits.json"
IMAGES = "scienceqa/images/test"


def read(root: Path, quirks: Quirks) -> list[Question]:
    path = need(root, QUESTIONS, "scienceqa")
    questions = []
    for number, row in enumerate(read_json(path, list)):
        name = str(field_of(row, "id", path, number))
        turns = field_of(row, "conversations", path, number, list)
        turn = field_of(turns[0] if turns else {}, "value", path, number, str)
        text = turn.replace("<image>", "").strip() + LETTER
        images: tuple[Path, ...] = ()
        if row.get("image"):
            image = field_of(row, "image", path, number, str)
            images = (image_path(root / IMAGES, image, owner=f"scienceqa {name}"),)
            text = with_image(text)
        questions.append(Question(id=name, text=text, images=images))
    return questions


def score(root: Path, questions: Sequence[Question], answers: Answers, quirks: Quirks) -> Score:
    """IMG-accuracy over every question with an image; LLaVA leaves those without an answer out of it."""
    path = need(root, PROBLEMS, "scienceqa")
    problems = read_json(path, dict)
    asked = {question.id: bool(question.images) for question in questions}
    splits = need(root, SPLITS, "scienceqa")
    split = [str(name) for name in field_of(read_json(splits, dict), "test", splits, "top", list)]
    notes = [*missing_note(questions, answers)]
    if unasked := [name for name in split if name not in asked]:
        notes.append(f"{len(unasked)} questions of the test split are not in {QUESTIONS}; wrong in the total")
    if unknown := [name for name in [*asked, *split] if name not in problems]:
        raise ValueError(f"{path} lacks {len(unknown)} questions, the first is {unknown[0]}")
    items, failed = [], 0
    for name in dict.fromkeys([*asked, *split]):
        row = problems[name]
        answer = answers.get(name, "")
        index = scienceqa_option(answer, len(field_of(row, "choices", path, name, list)))
        failed += index < 0
        right_index = field_of(row, "answer", path, name, int)
        right = float(index == right_index)
        reading, truth = (chr(65 + k) if k >= 0 else "" for k in (index, right_index))
        items.append(Item(id=name, answer=answer, reading=reading, truth=truth, score=right))
    if failed:
        notes.append(f"no letter could be read from {failed} answers; they count as wrong")
    with_picture = [item.score for item in items if asked.get(item.id, False)]
    return Score(
        value=100 * mean(with_picture),
        parts={
            "image": 100 * mean(with_picture),
            "text only": 100 * mean([item.score for item in items if not asked.get(item.id, False)]),
            "total": 100 * mean([item.score for item in items]),
        },
        items=tuple(items),
        notes=tuple(notes),
    )


BENCHMARK = Benchmark(
    name="scienceqa",
    column="SQA",
    files=(QUESTIONS, PROBLEMS, SPLITS),
    images=IMAGES,
    num_questions=4_241,
    max_new_tokens=1024,
    read=read,
    score=score,
)
