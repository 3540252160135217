"""VizWiz: test answers for the EvalAI server, and the local val split."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from llava_kd.durable import write_text
from llava_kd.evaluation.benchmarks.base import (
    SHORT,
    Answers,
    Benchmark,
    Item,
    Quirks,
    Score,
    field_of,
    human_answers,
    mean,
    missing_note,
    need,
    read_json,
    read_jsonl,
    with_image,
)
from llava_kd.evaluation.generation.questions import Question, image_path
from llava_kd.evaluation.scorers.vqa_text import normalise_m4c, normalise_vqa, vizwiz_accuracy

TEST_QUESTIONS = "vizwiz/llava_test.jsonl"
TEST_IMAGES = "vizwiz/test"
VAL_FILE = "vizwiz/val.json"
VAL_IMAGES = "vizwiz/val"
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


def read_test(root: Path, quirks: Quirks) -> list[Question]:
    path = need(root, TEST_QUESTIONS, "vizwiz")
    questions = []
    for number, row in enumerate(read_jsonl(path), start=1):
        name, image = (str(field_of(row, key, path, number)) for key in ("question_id", "image"))
        file = image_path(root / TEST_IMAGES, image, owner=f"vizwiz {name}")
        text = with_image(field_of(row, "text", path, number, str))
        questions.append(Question(id=name, text=text, images=(file,), extra={"image": image}))
    return questions


def upload_test(
    root: Path, questions: Sequence[Question], answers: Answers, quirks: Quirks, out_dir: Path
) -> Path:
    """The EvalAI file; every question must have an answer, as the server asks."""
    if missing := [question.id for question in questions if question.id not in answers]:
        raise ValueError(f"VizWiz wants every answer; {len(missing)} are missing, the first is {missing[0]}")
    normalise = normalise_m4c if quirks.upload_m4c else normalise_vqa
    uploaded = [{"image": q.extra["image"], "answer": normalise(answers[q.id])} for q in questions]
    path = out_dir / "upload_vizwiz_test.json"
    write_text(path, json.dumps(uploaded))
    return path


def read_val(root: Path, quirks: Quirks) -> list[Question]:
    path = need(root, VAL_FILE, "vizwiz_val")
    questions = []
    for number, row in enumerate(read_json(path, list)):
        image = str(field_of(row, "image", path, number))
        text = with_image(field_of(row, "question", path, number, str) + UNANSWERABLE + SHORT)
        file = image_path(root / VAL_IMAGES, image, owner=f"vizwiz_val {image}")
        questions.append(Question(id=image, text=text, images=(file,)))
    return questions


def score_val(root: Path, questions: Sequence[Question], answers: Answers, quirks: Quirks) -> Score:
    """Accuracy by the official rule, which normalises the prediction and not the humans."""
    path = need(root, VAL_FILE, "vizwiz_val")
    rows = {str(row["image"]): row for row in read_json(path, list)}
    items, kinds = [], defaultdict(list)
    for question in questions:
        row = rows[question.id]
        humans = human_answers(row, path, question.id)
        answer = answers.get(question.id, "")
        score = vizwiz_accuracy(answer, humans)
        truth = " | ".join(sorted(set(humans)))
        items.append(
            Item(id=question.id, answer=answer, reading=normalise_vqa(answer), truth=truth, score=score)
        )
        kinds[str(row.get("answer_type", "other"))].append(score)
    return Score(
        value=100 * mean([item.score for item in items]),
        parts={kind: 100 * mean(scores) for kind, scores in sorted(kinds.items())},
        items=tuple(items),
        notes=missing_note(questions, answers),
    )


TEST = Benchmark(
    name="vizwiz",
    column="VizWiz",
    files=(TEST_QUESTIONS,),
    images=TEST_IMAGES,
    num_questions=8_000,
    max_new_tokens=128,
    read=read_test,
    upload=upload_test,
    notes="scored by the EvalAI server (VizWiz VQA, test-standard)",
)
VAL = Benchmark(
    name="vizwiz_val",
    column="VizWiz val",
    files=(VAL_FILE,),
    images=VAL_IMAGES,
    num_questions=4_319,
    max_new_tokens=128,
    read=read_val,
    score=score_val,
)
