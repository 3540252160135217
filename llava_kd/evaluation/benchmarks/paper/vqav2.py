"""VQAv2: test-dev answers for the EvalAI server, and the local val2014 split."""

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
from llava_kd.evaluation.scorers.vqa_text import (
    flatten,
    is_identical,
    normalise_m4c,
    normalise_vqa,
    vqa_accuracy,
)

TEST_DEV = "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl"
TEST_ALL = "vqav2/llava_vqav2_mscoco_test2015.jsonl"
TEST_IMAGES = "vqav2/test2015"
VAL_QUESTIONS = "vqav2/v2_OpenEnded_mscoco_val2014_questions.json"
VAL_ANNOTATIONS = "vqav2/v2_mscoco_val2014_annotations.json"
VAL_IMAGES = "vqav2/val2014"


def read_test(root: Path, quirks: Quirks) -> list[Question]:
    path = need(root, TEST_DEV, "vqav2")
    questions = []
    for number, row in enumerate(read_jsonl(path), start=1):
        name = str(field_of(row, "question_id", path, number))
        image, text = (field_of(row, key, path, number, str) for key in ("image", "text"))
        file = image_path(root / TEST_IMAGES, image, owner=f"vqav2 {name}")
        questions.append(Question(id=name, text=with_image(text), images=(file,)))
    return questions


def upload_test(
    root: Path, questions: Sequence[Question], answers: Answers, quirks: Quirks, out_dir: Path
) -> Path:
    """The EvalAI file: every test2015 question in its order, "" where test-dev does not ask it."""
    normalise = normalise_m4c if quirks.upload_m4c else normalise_vqa
    rows = read_jsonl(need(root, TEST_ALL, "vqav2"))
    ids = [field_of(row, "question_id", root / TEST_ALL, number) for number, row in enumerate(rows, start=1)]
    uploaded = [{"question_id": name, "answer": normalise(answers.get(str(name), ""))} for name in ids]
    known = set(map(str, ids))
    if lost := [question.id for question in questions if question.id not in known]:
        raise ValueError(f"{root / TEST_ALL} lacks {len(lost)} questions of test-dev, the first is {lost[0]}")
    path = out_dir / "upload_vqav2_test-dev2015.json"
    write_text(path, json.dumps(uploaded))
    return path


def read_val(root: Path, quirks: Quirks) -> list[Question]:
    path = need(root, VAL_QUESTIONS, "vqav2_val")
    questions = []
    for number, row in enumerate(field_of(read_json(path, dict), "questions", path, "top", list)):
        name = str(field_of(row, "question_id", path, number))
        text = field_of(row, "question", path, number, str)
        file = f"COCO_val2014_{field_of(row, 'image_id', path, number, int):012d}.jpg"
        questions.append(Question(id=name, text=with_image(text + SHORT), images=(root / VAL_IMAGES / file,)))
    return questions


def score_val(root: Path, questions: Sequence[Question], answers: Answers, quirks: Quirks) -> Score:
    path = need(root, VAL_ANNOTATIONS, "vqav2_val")
    rows = field_of(read_json(path, dict), "annotations", path, "top", list)
    annotations = {str(field_of(row, "question_id", path, number)): row for number, row in enumerate(rows)}
    if unknown := [q.id for q in questions if q.id not in annotations]:
        raise ValueError(f"{path} has no annotation of {len(unknown)} questions, the first is {unknown[0]}")
    items, kinds = [], defaultdict(list)
    identical = lost = without_id = 0
    for question in questions:
        row = annotations[question.id]
        humans = human_answers(row, path, question.id)
        answer = answers.get(question.id, "")
        score = vqa_accuracy(answer, humans, skip_identical=quirks.vqav2_skip_identical)
        if is_identical([flatten(human) for human in humans]):
            identical += 1
            lost += vqa_accuracy(answer, humans) < vqa_accuracy(answer, humans, skip_identical=False)
        without_id += not all(isinstance(a, dict) and "answer_id" in a for a in row["answers"])
        reading, truth = normalise_vqa(answer), " | ".join(sorted(set(humans)))
        items.append(Item(id=question.id, answer=answer, reading=reading, truth=truth, score=score))
        kinds[str(row.get("answer_type", "other"))].append(score)
    notes = [*missing_note(questions, answers)]
    if identical:
        how = "as the official code does" if quirks.vqav2_skip_identical else "against the official code"
        state = "not normalised" if quirks.vqav2_skip_identical else "normalised"
        notes.append(
            f"{identical} questions with ten equal answers are {state}, {how}; this decides {lost} of them"
        )
    if without_id:
        notes.append(
            f"{without_id} annotations lack answer_id: the official code would merge equal answers and "
            "score them 0; they are counted one by one here"
        )
    return Score(
        value=100 * mean([item.score for item in items]),
        parts={kind: 100 * mean(scores) for kind, scores in sorted(kinds.items())},
        items=tuple(items),
        notes=tuple(notes),
    )


TEST = Benchmark(
    name="vqav2",
    column="VQAv2",
    files=(TEST_DEV, TEST_ALL),
    images=TEST_IMAGES,
    num_questions=107_394,
    max_new_tokens=128,
    read=read_test,
    upload=upload_test,
    notes="scored by the EvalAI server (VQA Challenge, test-dev)",
)
VAL = Benchmark(
    name="vqav2_val",
    column="VQAv2 val",
    files=(VAL_QUESTIONS, VAL_ANNOTATIONS),
    images=VAL_IMAGES,
    num_questions=214_354,
    max_new_tokens=128,
    read=read_val,
    score=score_val,
    notes="COCO train2017, on which LLaVA trains, holds val2014 images: not a clean score",
)
