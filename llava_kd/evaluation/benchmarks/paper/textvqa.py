"""TextVQA val with LLaVA's OCR line: M4C soft accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llava_kd.evaluation.benchmarks.base import (
    SHORT,
    Answers,
    Benchmark,
    Item,
    JsonDict,
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
from llava_kd.evaluation.scorers.vqa_text import normalise_m4c, textvqa_accuracy

QUESTIONS = "textvqa/llava_textvqa_val_v051_ocr.jsonl"
ANNOTATIONS = "textvqa/TextVQA_0.5.1_val.json"
IMAGES = "textvqa/train_images"
OCR = "Reference OCR token:"


def question_of(prompt: str) -> str:
    """The bare question of a prompt, lower case: the official join key together with the image id."""
    lines = prompt.removesuffix(SHORT).split("\n")
    if len(lines) == 2 and lines[0].startswith(OCR):
        lines = lines[1:]
    elif len(lines) == 2 and lines[1].startswith(OCR):
        lines = lines[:1]
    return "\n".join(lines).lower()


def _annotations(root: Path) -> dict[tuple[str, str], JsonDict]:
    path = need(root, ANNOTATIONS, "textvqa")
    found = {}
    for number, row in enumerate(field_of(read_json(path, dict), "data", path, "top", list)):
        image, question = (field_of(row, key, path, number) for key in ("image_id", "question"))
        found[str(image), str(question).lower()] = row
    return found


def read(root: Path, quirks: Quirks) -> list[Question]:
    """Questions by the annotation's own id: in LLaVA's file several share one, that of the image."""
    path = need(root, QUESTIONS, "textvqa")
    annotations = _annotations(root)
    questions, seen = [], {}
    for number, row in enumerate(read_jsonl(path), start=1):
        image, text = (str(field_of(row, key, path, number)) for key in ("question_id", "text"))
        key = (image, question_of(text))
        if key not in annotations:
            raise ValueError(
                f"{path}, line {number}: {root / ANNOTATIONS} has no question {key[1]!r} on {image}"
            )
        name = str(annotations[key].get("question_id", f"{image} {key[1]}"))
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1:  # the same question twice on one image
            name = f"{name}#{seen[name]}"
        file = image_path(root / IMAGES, field_of(row, "image", path, number, str), owner=f"textvqa {name}")
        extra = {"source_id": image, "key": key[1]}
        questions.append(Question(id=name, text=with_image(text), images=(file,), extra=extra))
    return questions


def score(root: Path, questions: Sequence[Question], answers: Answers, quirks: Quirks) -> Score:
    annotations = _annotations(root)
    items = []
    for question in questions:
        row = annotations[question.extra["source_id"], question.extra["key"]]
        humans = human_answers(row, root / ANNOTATIONS, question.id)
        answer = answers.get(question.id, "")
        try:
            value = textvqa_accuracy(answer, humans)
        except ValueError as error:
            raise ValueError(f"{root / ANNOTATIONS}: question {question.id}: {error}") from error
        truth = " | ".join(sorted(set(humans)))
        items.append(
            Item(id=question.id, answer=answer, reading=normalise_m4c(answer), truth=truth, score=value)
        )
    return Score(
        value=100 * mean([item.score for item in items]),
        parts={},
        items=tuple(items),
        notes=missing_note(questions, answers),
    )


BENCHMARK = Benchmark(
    name="textvqa",
    column="TextVQA",
    files=(QUESTIONS, ANNOTATIONS),
    images=IMAGES,
    num_questions=5_000,
    max_new_tokens=128,
    read=read,
    score=score,
    notes="with the Rosetta OCR line, as the papers have it; without it scores are far lower",
)
