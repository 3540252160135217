"""MMMU val, in the files of TinyLLaVA: multiple choice and open questions, accuracy over all."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from llava_kd.evaluation.benchmarks.base import (
    NAME,
    TRUTH,
    Answers,
    Benchmark,
    Item,
    JsonDict,
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
from llava_kd.evaluation.scorers.choice import mmmu_choice
from llava_kd.evaluation.scorers.open_answer import is_open_correct

QUESTIONS = "MMMU/anns_for_eval.json"
ANSWERS = "MMMU/answer_dict_val.json"
IMAGES = "MMMU/all_images"
MULTIPLE_CHOICE = "multiple-choice"


def _rows(root: Path) -> list[JsonDict]:
    path = need(root, QUESTIONS, "mmmu")
    rows = read_json(path, list)
    for number, row in enumerate(rows):
        for key, kind in (("id", NAME), ("prompt", str), ("question_type", str)):
            field_of(row, key, path, number, kind)
    return rows


def read(root: Path, quirks: Quirks) -> list[Question]:
    """Questions with one image. Those with several carry none in this file, and are not asked."""
    questions = []
    for row in _rows(root):
        if "image" not in row:
            continue
        name = str(row["id"])
        image = field_of(row, "image", root / QUESTIONS, name, str)
        file = image_path(root / IMAGES, image, owner=f"mmmu {name}")
        questions.append(Question(id=name, text=with_image(row["prompt"]), images=(file,)))
    return questions


def _options(root: Path, name: str, row: JsonDict) -> tuple[list[str], dict[str, str]]:
    """Letters of a question, and their texts."""
    path = root / QUESTIONS
    letters = field_of(row, "all_choices", path, name, list)
    if not letters:
        raise ValueError(f"{path}: entry {name}: 'all_choices' must hold the letters, and is empty")
    texts = field_of(row, "index2ans", path, name, dict)
    return list(map(str, letters)), {letter: str(text) for letter, text in texts.items()}


def score(root: Path, questions: Sequence[Question], answers: Answers, quirks: Quirks) -> Score:
    """Micro accuracy over every question of the answer file."""
    path = need(root, ANSWERS, "mmmu")
    golds = read_json(path, dict)
    rows = {str(row["id"]): row for row in _rows(root)}
    if unknown := [name for name in golds if name not in rows]:
        raise ValueError(f"{root / QUESTIONS} lacks {len(unknown)} questions, the first is {unknown[0]}")
    # The official module draws from one generator in the order of the questions.
    guess = random.Random(42) if quirks.mmmu_guess else None
    items, subjects = [], defaultdict(list)
    guessed = unasked = 0
    for name, row in rows.items():
        if name not in golds:
            continue
        gold = golds[name]
        answer = answers.get(name, "")
        has_image = "image" in row
        unasked += not has_image
        truths = field_of(gold, "ground_truth", path, name, TRUTH)
        if field_of(gold, "question_type", path, name) == MULTIPLE_CHOICE:
            choice = mmmu_choice(answer, *_options(root, name, row), guess=guess)
            reading = f"{choice.letter} (guess)" if choice.is_guess else choice.letter
            guessed += choice.is_guess and has_image
            right = choice.letter in truths if isinstance(truths, list) else choice.letter == truths
        else:
            wanted = truths if isinstance(truths, list) else [truths]
            reading, right = answer, has_image and is_open_correct(answer, wanted)
        items.append(Item(id=name, answer=answer, reading=reading, truth=str(truths), score=float(right)))
        subjects[_subject(name)].append(float(right))
    notes = [*missing_note(questions, answers)]
    what = "a letter is drawn (seed 42)" if quirks.mmmu_guess else "they count as wrong"
    if guessed:
        notes.append(f"no option could be read from {guessed} answers: {what}")
    if unasked:
        notes.append(f"{unasked} questions have several images and are not asked: {what}")
    if lacking := [name for name in rows if name not in golds]:
        notes.append(f"{len(lacking)} questions have no truth in {ANSWERS} and do not count")
    choice_scores = [i.score for i in items if golds[i.id]["question_type"] == MULTIPLE_CHOICE]
    open_scores = [i.score for i in items if golds[i.id]["question_type"] != MULTIPLE_CHOICE]
    return Score(
        value=100 * mean([item.score for item in items]),
        parts={
            MULTIPLE_CHOICE: 100 * mean(choice_scores),
            "open": 100 * mean(open_scores),
            **{subject: 100 * mean(scores) for subject, scores in sorted(subjects.items())},
        },
        items=tuple(items),
        notes=tuple(notes),
    )


def _subject(name: str) -> str:
    """ "Music" of "validation_Music_7"."""
    return name.partition("_")[2].rpartition("_")[0] or "all"


BENCHMARK = Benchmark(
    name="mmmu",
    column="MMMU",
    files=(QUESTIONS, ANSWERS),
    images=IMAGES,
    num_questions=None,  # 900 in all; those with several images are not asked
    max_new_tokens=1024,
    read=read,
    score=score,
)
